"""Loading a skops file does not cost a replica torch. A process of its own: imports happen once."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_skops_file_is_loaded_without_torch(tmp_path: Path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    io = pytest.importorskip("skops.io")
    file = tmp_path / "model.skops"
    io.dump(linear_model.LinearRegression().fit([[0.0], [1.0]], [1.0, 3.0]), file)
    code = """
import sys
from pathlib import Path
from twinpath.registry.flavors import skops_files
print(skops_files.load(Path(sys.argv[1])).predict([[2.0]]))
assert "torch" not in sys.modules
# Who wants it afterwards gets it.
import sklearn.externals.array_api_compat.torch
assert "torch" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[5.]\n"), done.stderr
