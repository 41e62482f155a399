"""The artifact cache of a node: versions' files, checked by content, shared by its processes.

Layout below the root: ``objects/<key>/files`` (a version's files), ``objects/<key>/entry.json``
(their digests, written last), ``locks/<key>``, ``partial/`` (downloads under way), ``served/``
(which version of a model was served last). A version is visible only once it is complete: it is
downloaded aside, hashed, and renamed into place. Files are hashed again whenever a process opens
an entry, so damage on disk is found and mended by another download.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinpath.errors import ArtifactError, MissingExtraError, RegistryError
from twinpath.registry.manifest import MLMODEL
from twinpath.registry.reference import VersionInfo

_CHUNK_BYTES = 1 << 20
#: Downloads that nobody touched for so long belong to a process that died.
_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One version in the cache. ``digest`` is over ``files`` (relative path → sha256)."""

    folder: Path
    digest: str
    size_bytes: int


class ArtifactCache:
    """Bounded by ``max_bytes``: the entries used longest ago go first, never one that is open in
    any process of this node (each holds a shared lock file)."""

    def __init__(
        self, root: Path, *, max_bytes: int = 20 * 2**30, lock_timeout_s: float = 900.0
    ) -> None:
        self.root, self._max_bytes, self._lock_timeout_s = root, max_bytes, lock_timeout_s
        for name in ("objects", "locks", "partial", "served", "users"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._open: set[str] = set()

    def fetch(
        self, registry_uri: str, info: VersionInfo, download: Callable[[Path], Path]
    ) -> Entry:
        """The files of a version, downloaded unless they are here and whole.

        ``download`` copies them below the empty folder that it is given and returns the one that
        has the MLmodel file. Raises ArtifactError when what came is not a model, or not what the
        version's digest says; whatever ``download`` raises.
        """
        key = _key(registry_uri, info)
        with self._locked(key):
            entry = self._checked(key, info)
            if entry is None:
                entry = self._download(key, info, download)
            self._hold(key)
            os.utime(self._place(key) / "entry.json")
        self._evict()
        return entry

    def release(self, registry_uri: str, info: VersionInfo) -> None:
        """This process no longer needs the files of a version; they may be evicted."""
        key = _key(registry_uri, info)
        self._open.discard(key)
        self._user(key).unlink(missing_ok=True)

    def remember(self, registry_uri: str, reference: str, info: VersionInfo) -> None:
        """Note which version a reference named when it last served."""
        path = self._served(registry_uri, reference)
        document = asdict(info) | {"tags": dict(info.tags), "aliases": list(info.aliases)}
        _write(path, document)

    def last_served(self, registry_uri: str, reference: str) -> VersionInfo | None:
        """The version that a reference named when it last served here; None if it never did, or if
        its files are gone."""
        try:
            document = json.loads(self._served(registry_uri, reference).read_text())
            document["aliases"] = tuple(document["aliases"])
            info = VersionInfo(**document)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return info if (self._place(_key(registry_uri, info)) / "entry.json").is_file() else None

    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def _place(self, key: str) -> Path:
        return self.root / "objects" / key

    def _user(self, key: str) -> Path:
        return self.root / "users" / f"{key}.{os.getpid()}"

    def _served(self, registry_uri: str, reference: str) -> Path:
        name = hashlib.sha256(f"{registry_uri}\0{reference}".encode()).hexdigest()[:32]
        return self.root / "served" / f"{name}.json"

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        try:
            from filelock import FileLock, Timeout
        except ImportError:
            raise MissingExtraError("filelock", "registry") from None
        try:
            with FileLock(self.root / "locks" / key, timeout=self._lock_timeout_s):
                yield
        except Timeout:
            raise RegistryError(
                f"another process has been fetching {key} for {self._lock_timeout_s:g} s"
            ) from None

    def _checked(self, key: str, info: VersionInfo) -> Entry | None:
        """The entry if its files are what they were; None, and nothing left, if not."""
        place = self._place(key)
        try:
            document = json.loads((place / "entry.json").read_text())
            files: dict[str, str] = document["files"]
            whole = hashes_of(place / "files") == files
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(place, ignore_errors=True)
            return None
        digest = digest_of(files)
        if info.digest is not None and info.digest != digest:
            shutil.rmtree(place, ignore_errors=True)
            return None
        return Entry(place / "files", digest, int(document["bytes"]))

    def _download(self, key: str, info: VersionInfo, download: Callable[[Path], Path]) -> Entry:
        self._sweep()
        partial = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self.root / "partial"))
        try:
            (partial / "raw").mkdir()
            model = download(partial / "raw")
            if not (model / MLMODEL).is_file():
                raise ArtifactError(f"what was downloaded of {info.name!r} has no {MLMODEL} file")
            ready = partial / "entry"
            ready.mkdir()
            model.rename(ready / "files")
            files = hashes_of(ready / "files")
            digest = digest_of(files)
            if info.digest is not None and info.digest != digest:
                raise ArtifactError(
                    f"{info.name!r} version {info.version}: its files have {digest}, and the "
                    f"registry says {info.digest}: they are damaged or were changed"
                )
            size = sum((ready / "files" / name).stat().st_size for name in files)
            _write(ready / "entry.json", {"files": files, "bytes": size, "name": info.name,
                                          "version": info.version})  # fmt: skip
            ready.rename(self._place(key))
            return Entry(self._place(key) / "files", digest, size)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _hold(self, key: str) -> None:
        self._open.add(key)
        self._user(key).touch()

    def _sweep(self) -> None:
        """Remove downloads of processes that died."""
        for path in (self.root / "partial").iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> list[tuple[str, int, float]]:
        found = []
        for place in (self.root / "objects").iterdir():
            with contextlib.suppress(OSError, ValueError, KeyError):
                path = place / "entry.json"
                size = int(json.loads(path.read_text())["bytes"])
                found.append((place.name, size, path.stat().st_mtime))
        return found

    def _evict(self) -> None:
        entries = sorted(self._entries(), key=lambda entry: entry[2])
        total = sum(size for _, size, _ in entries)
        for key, size, _ in entries:
            if total <= self._max_bytes:
                return
            if key in self._open or self._in_use(key):
                continue
            with self._locked(key):
                if not self._in_use(key):
                    shutil.rmtree(self._place(key), ignore_errors=True)
                    total -= size

    def _in_use(self, key: str) -> bool:
        """Whether a living process of this node has the entry open."""
        for path in (self.root / "users").glob(f"{key}.*"):
            pid = path.name.rpartition(".")[2]
            if pid.isdigit() and _alive(int(pid)):
                return True
            path.unlink(missing_ok=True)
        return False


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path. Links are refused with ArtifactError:
    they could lead anywhere."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(f"{path.name!r} is a link: a version's files must be its own")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = _sha256(path)
    return found


def digest_of(files: dict[str, str]) -> str:
    """``sha256:…`` over the sorted relative paths and hashes of files (`hashes_of`)."""
    text = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def default_root() -> Path:
    """``$TWINPATH_CACHE``, else a folder of this user in the place for caches."""
    given = os.environ.get("TWINPATH_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "twinpath" / "models"


def _key(registry_uri: str, info: VersionInfo) -> str:
    # The source is part of it: a database that was made anew counts versions from 1 again.
    text = f"{registry_uri}\0{info.name}\0{info.version}\0{info.source}\0{info.created_s}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _write(path: Path, document: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old or the new document, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    with os.fdopen(handle, "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
