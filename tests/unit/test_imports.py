"""`import twinpath` is light, and imports go one way."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Distributions behind an extra, each imported when its feature is used and not before.
OPTIONAL = {
    *("fastapi", "feast", "matplotlib", "mlflow", "msgspec", "pandas", "polars", "pyarrow"),
    *("ray", "sklearn", "starlette", "torch", "transformers", "uvicorn", "vllm"),
}

IMPORT_LIMIT_S = 0.150


def run(code: str) -> str:
    """What `code` prints in a fresh interpreter that finds the library as a user's would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has its bytecode
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pulls_no_optional_dependency():
    loaded = run(
        "import sys, json, twinpath; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not OPTIONAL & set(json.loads(loaded))


def test_import_takes_under_150_ms():
    code = (
        "import time; began = time.perf_counter(); import twinpath; "
        "print(time.perf_counter() - began)"
    )
    run(code)  # the first run compiles and warms the page cache
    best = min(float(run(code)) for _ in range(5))
    assert best < IMPORT_LIMIT_S, f"import twinpath took {best * 1e3:.0f} ms"


def test_every_exported_name_exists():
    missing = run(
        "import json, twinpath; "
        "print(json.dumps([n for n in twinpath.__all__ if not hasattr(twinpath, n)]))"
    )
    assert json.loads(missing) == []


def test_import_contracts_hold():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
