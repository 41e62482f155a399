"""The stories of the guard and the machine take every branch of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("guard", "checks", "sequential", "machine", "verdict", "state", "mirror")
STORIES = ("test_rollout_guard", "test_rollout_machine")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_branch_of_the_guard_and_the_machine_is_taken(tmp_path):
    wanted = ",".join(f"*/twinpath/rollout/{name}.py" for name in MODULES)
    environment = {**os.environ, "COVERAGE_FILE": str(tmp_path / "data")}
    run = [sys.executable, "-m", "coverage"]
    tests = [f"tests/unit/{name}.py" for name in STORIES]
    story = [*run, "run", "--branch", f"--include={wanted}", "-m", "pytest", "-q", "-x",
             "-p", "no:cacheprovider", *tests]  # fmt: skip
    done = subprocess.run(
        story, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = tmp_path / "report.json"
    subprocess.run(
        [*run, "json", "-q", "-o", str(report)],
        cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    files = json.loads(report.read_text())["files"]
    assert len(files) == len(MODULES)
    missing = {
        name: (found["missing_lines"], found["missing_branches"])
        for name, found in files.items()
        if found["missing_lines"] or found["missing_branches"]
    }
    assert missing == {}
