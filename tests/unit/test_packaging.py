"""The wheel, the lock and the folder `platform/` are what an installation needs them to be."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements" / "lock.txt").read_text()
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", LOCK, flags=re.MULTILINE)
}

#: Extras that the CPU lock does not serve.
NOT_LOCKED = {"llm-gpu", "all"}


def run(*command: str | Path, cwd: Path, timeout: float = 120) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- the folder ---------------------------------------------------------------------------


def test_the_folder_platform_does_not_shadow_the_standard_library():
    system = run(sys.executable, "-c", "import platform; print(platform.system())", cwd=ROOT)
    assert system.strip() == "Linux"


def test_platform_is_a_folder_and_no_package():
    assert not list((ROOT / "platform").glob("*.py"))


# --- the wheel ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "platform" / "twinpath",
        source / "platform" / "twinpath",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    out = source / "dist"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    library = ROOT / "platform"
    ours = {
        str(path.relative_to(library))
        for path in (library / "twinpath").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == ours


def test_the_wheel_says_that_it_is_typed_and_has_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
        assert "twinpath/py.typed" in names
        assert any(name.endswith("/licenses/LICENSE") for name in names)
        assert "twinpath = twinpath.cli:main" in archive.read(entry_points).decode()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(300)
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """Only the core dependencies are there: no Ray, no torch, no pandas."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    pins = tmp_path / "constraints.txt"
    pins.write_text(LOCK)
    run(python, "-m", "pip", "install", "-q", "-c", pins, wheel, cwd=tmp_path, timeout=240)

    report = json.loads(
        run(
            python,
            "-c",
            "import sys, json, twinpath; print(json.dumps([twinpath.__file__, *sys.modules]))",
            cwd=tmp_path,
        )
    )
    assert report[0].startswith(str(home))
    assert not {"ray", "torch", "pandas", "mlflow", "feast"} & set(report)

    installed = json.loads(
        run(python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check",
            cwd=tmp_path)
    )  # fmt: skip
    assert not {"ray", "torch"} & {row["name"].lower() for row in installed}
    assert "Usage" in run(home / "bin" / "twinpath", "--help", cwd=tmp_path)


# --- the lock -----------------------------------------------------------------------------


def requirements() -> list[tuple[str, str]]:
    """(extra, requirement) of the core and of every extra that the lock serves."""
    found = [("core", line) for line in PROJECT["dependencies"]]
    for extra, lines in PROJECT["optional-dependencies"].items():
        if extra not in NOT_LOCKED:
            found += [(extra, line) for line in lines]
    return found


@pytest.mark.parametrize(("extra", "line"), requirements())
def test_the_lock_satisfies(extra, line):
    requirement = Requirement(line)
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"{name} of {extra} is not in the lock"
    assert requirement.specifier.contains(PINS[name], prereleases=True)


def test_every_line_of_the_lock_is_one_plain_pin():
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.!]*", line)]
    assert wrong == []
    assert len(PINS) == len(lines), "a package is pinned twice"


def test_what_breaks_on_a_cpu_is_left_out_of_the_lock():
    left_out = ("torchvision", "torchaudio", "torchcodec", "triton")
    assert not [pin for pin in PINS if pin in left_out or pin.startswith(("nvidia-", "cuda-"))]


def test_all_names_every_extra_of_the_lock():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(PROJECT["optional-dependencies"]) - NOT_LOCKED


def test_no_file_names_a_package_index():
    """Which index serves the packages is the machine's business."""
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    # Written apart, so that this file does not find itself.
    hosts = re.compile(
        "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch"))
    )
    suffixes = {".toml", ".txt", ".in", ".sh", ".yaml", ".yml", ".py", ".md", ".cfg", ""}
    naming = [
        name
        for name in tracked.splitlines()
        if Path(name).suffix in suffixes
        and (ROOT / name).is_file()
        and hosts.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert naming == []
