"""A trial in a process of its own, for versions whose loading runs code.

Code can crash, hang, or ask for all memory there is. So such a version is first loaded, and asked
its example, in a child with limits of memory and time; only if that went well does this process
load it, too. ``python -m twinpath.registry.trial`` reads a request from its standard input.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinpath.errors import MemoryBudgetError, ModelError, ModelLoadError, error_of
from twinpath.graph.dtypes import ColumnType
from twinpath.registry.device import TorchOptions
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.trust import Format

TIMEOUT_S = 180.0
_NICE = 5
_MARK = "twinpath-trial: "


def run(
    folder: Path,
    found: Format,
    options: LoadOptions,
    given: Mapping[str, ColumnType],
    allowed_bytes: int,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Raises ModelError of the kind that the child reports; MemoryBudgetError or ModelLoadError
    when it ended without a word."""
    request = {
        "folder": str(folder),
        "format": asdict(found),
        "outputs": {name: str(kind) for name, kind in options.outputs.items()},
        "torch": asdict(options.torch) | {"device": "cpu", "compile": False, "cuda_graphs": False},
        "architecture": options.architecture,
        "given": {name: str(kind) for name, kind in given.items()},
        "allowed_bytes": allowed_bytes,
    }
    paths = os.pathsep.join(path for path in sys.path if path)
    # A group of its own: whatever the code starts ends with it.
    child = subprocess.Popen(
        [sys.executable, "-m", "twinpath.registry.trial"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = child.communicate(json.dumps(request), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ModelLoadError(f"it was not loaded within {timeout_s:g} s in a trial") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    said = [line for line in output.splitlines() if line.startswith(_MARK)]
    if said:
        report = json.loads(said[-1].removeprefix(_MARK))
        if report["ok"]:
            return
        error = error_of(report["code"], report["message"])
        raise error if isinstance(error, ModelError) else ModelLoadError(report["message"])
    if child.returncode in (-signal.SIGKILL, 137):
        raise MemoryBudgetError("a trial of loading it was killed: it asked for too much memory")
    last = (errors.strip().splitlines() or ["no word"])[-1][:300]
    raise ModelLoadError(f"a trial of loading it ended with status {child.returncode}: {last}")


def _try(request: dict[str, Any]) -> None:
    from twinpath.registry import checks
    from twinpath.registry.loading import LiveModel, load_model
    from twinpath.registry.manifest import read_manifest
    from twinpath.registry.signature import Binding

    types = {name: _kind(text) for name, text in request["given"].items()}
    options = LoadOptions(
        {name: _kind(text) for name, text in request["outputs"].items()},
        TorchOptions(**request["torch"]),
        request["architecture"],
    )
    manifest = read_manifest(Path(request["folder"]))
    found = Format(**request["format"])
    model = load_model(manifest, found, options, int(request["allowed_bytes"]))
    live = LiveModel(model, Binding(manifest.signature, types, options.outputs), "", found, 0)
    named = {name: kind for name, kind in types.items() if name in live.binding.names}
    example = checks.read_example(manifest, named)
    if example is not None:
        checks.check_answers(live.predict, example, "the input example")


def _kind(text: str) -> ColumnType:
    return ColumnType.parse(text)


def _say(report: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{_MARK}{json.dumps(report)}\n")
    sys.stdout.flush()


def main() -> None:
    """The child: a request in, one line of report out."""
    os.nice(_NICE)
    request = json.load(sys.stdin)
    try:
        _try(request)
    except ModelError as error:
        _say({"ok": False, "code": error.code, "message": error.message})
    except MemoryError:
        allowed = request["allowed_bytes"] / 2**20
        text = f"it asked for more memory than the {allowed:,.0f} MiB that it may take"
        _say({"ok": False, "code": MemoryBudgetError.code, "message": text})
    except Exception as error:
        _say(
            {
                "ok": False,
                "code": ModelLoadError.code,
                "message": f"{type(error).__name__}: {error}",
            }
        )
    else:
        _say({"ok": True})
    os._exit(0)  # threads of its code are not waited for


if __name__ == "__main__":
    main()
