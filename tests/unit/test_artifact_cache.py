"""The artifact cache under faults: damage, half downloads, other processes, a full disk budget."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from twinpath.errors import ArtifactError, RegistryError
from twinpath.registry.cache import ArtifactCache, digest_of, hashes_of
from twinpath.registry.reference import DIGEST_TAG, VersionInfo

URI = "sqlite:///x.db"


def info(version: str = "1", **tags: str) -> VersionInfo:
    return VersionInfo("m", version, f"/models/{version}", tags=tags)


class Source:
    """Downloads files of a given size, and counts how often."""

    def __init__(self, size: int = 10) -> None:
        self.calls, self.size = 0, size

    def __call__(self, folder: Path) -> Path:
        self.calls += 1
        model = folder / "model"
        model.mkdir()
        (model / "MLmodel").write_text("flavors: {}")
        (model / "weights").write_bytes(b"w" * self.size)
        return model


def test_files_are_downloaded_once_and_survive_a_restart(tmp_path: Path):
    source = Source()
    first = ArtifactCache(tmp_path).fetch(URI, info(), source)
    again = ArtifactCache(tmp_path).fetch(URI, info(), source)
    assert first == again
    assert source.calls == 1
    assert (first.folder / "weights").read_bytes() == b"w" * 10


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "added", "half an entry"])
def test_damage_on_disk_is_found_and_mended_by_another_download(tmp_path: Path, fault: str):
    source = Source()
    entry = ArtifactCache(tmp_path).fetch(URI, info(), source)
    weights = entry.folder / "weights"
    match fault:
        case "truncated":
            os.truncate(weights, 3)
        case "flipped":
            weights.write_bytes(b"W" + b"w" * 9)
        case "missing":
            weights.unlink()
        case "added":
            (entry.folder / "conftest.py").write_text("import os")
        case "half an entry":
            document = entry.folder.parent / "entry.json"
            document.write_text(document.read_text()[:20])
    mended = ArtifactCache(tmp_path).fetch(URI, info(), source)
    assert source.calls == 2
    assert mended == entry
    assert weights.read_bytes() == b"w" * 10


def test_a_download_that_breaks_off_leaves_nothing_that_could_be_taken_for_a_version(
    tmp_path: Path,
):
    def broken(folder: Path) -> Path:
        Source()(folder)
        raise RegistryError("the connection broke")

    cache = ArtifactCache(tmp_path)
    with pytest.raises(RegistryError, match="broke"):
        cache.fetch(URI, info(), broken)
    assert list((tmp_path / "objects").iterdir()) == []
    assert list((tmp_path / "partial").iterdir()) == []
    source = Source()
    cache.fetch(URI, info(), source)
    assert source.calls == 1


def test_a_process_that_is_killed_while_it_downloads_leaves_nothing_either(tmp_path: Path):
    script = """
import os, signal, sys
from pathlib import Path
from twinpath.registry.cache import ArtifactCache
from twinpath.registry.reference import VersionInfo
def half(folder):
    (folder / "model").mkdir()
    (folder / "model" / "MLmodel").write_text("flavors: {}")
    os.kill(os.getpid(), signal.SIGKILL)
ArtifactCache(Path(sys.argv[1])).fetch("sqlite:///x.db", VersionInfo("m", "1", "/models/1"), half)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == -9
    source = Source()
    entry = ArtifactCache(tmp_path, lock_timeout_s=20).fetch(URI, info(), source)
    assert source.calls == 1
    assert (entry.folder / "weights").exists()


def test_two_at_a_time_download_once(tmp_path: Path):
    started = threading.Barrier(4)
    sources = [Source() for _ in range(4)]

    def fetch(source: Source) -> None:
        cache = ArtifactCache(tmp_path)
        started.wait()
        cache.fetch(URI, info(), source)

    threads = [threading.Thread(target=fetch, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(source.calls for source in sources) == 1


def test_a_digest_that_the_registry_noted_is_insisted_on(tmp_path: Path):
    source = Source()
    right = ArtifactCache(tmp_path / "a").fetch(URI, info(), source).digest
    noted = info(**{DIGEST_TAG: right})
    assert ArtifactCache(tmp_path / "b").fetch(URI, noted, source).digest == right
    wrong = info(**{DIGEST_TAG: "sha256:" + "0" * 64})
    with pytest.raises(ArtifactError, match="damaged or were changed"):
        ArtifactCache(tmp_path / "c").fetch(URI, wrong, source)
    assert list((tmp_path / "c" / "objects").iterdir()) == []


def test_what_was_used_longest_ago_goes_first_and_what_is_open_stays(tmp_path: Path):
    cache = ArtifactCache(tmp_path, max_bytes=250)
    for version in ("1", "2"):
        entry = cache.fetch(URI, info(version), Source(80))
        os.utime(entry.folder.parent / "entry.json", (int(version), int(version)))
    cache.release(URI, info("2"))
    cache.fetch(URI, info("3"), Source(80))
    sources = {version: Source(80) for version in ("1", "2")}
    for version, source in sources.items():
        cache.fetch(URI, info(version), source)
    assert sources["1"].calls == 0  # the oldest, but this process has it open
    assert sources["2"].calls == 1


def test_entries_of_a_process_that_died_are_not_held_for_ever(tmp_path: Path):
    cache = ArtifactCache(tmp_path, max_bytes=150)
    entry = cache.fetch(URI, info("1"), Source(80))
    key = entry.folder.parent.name
    cache.release(URI, info("1"))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    (tmp_path / "users" / f"{key}.{dead}").touch()
    cache.fetch(URI, info("2"), Source(80))
    assert not entry.folder.exists()


def test_what_served_last_is_remembered_with_its_files(tmp_path: Path):
    cache = ArtifactCache(tmp_path)
    assert cache.last_served(URI, "models:/m@champion") is None
    known = info("7", a="b")
    cache.fetch(URI, known, Source())
    cache.remember(URI, "models:/m@champion", known)
    assert ArtifactCache(tmp_path).last_served(URI, "models:/m@champion") == known
    assert cache.last_served(URI, "models:/m@other") is None


def test_links_are_refused(tmp_path: Path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "MLmodel").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="link"):
        hashes_of(tmp_path / "files")


def test_a_digest_depends_on_names_and_contents_alone():
    assert digest_of({"b": "2", "a": "1"}) == digest_of({"a": "1", "b": "2"})
    assert digest_of({"a": "1"}) != digest_of({"b": "1"})
