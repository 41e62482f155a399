"""A registry of dicts, whose calls can be made to fail: for tests about faults."""

from pathlib import Path

from twinpath.errors import RegistryError, UnknownModelError
from twinpath.registry.reference import ModelState, VersionInfo


class Faulty:
    """`desk.Shelf` over dicts. ``fail_in`` counts down with each write; the one at 0 fails before
    it is done, and every call after it, until ``fail_in`` is set anew."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.version_tags: dict[str, dict[str, str]] = {}
        self.files: list[str] = []
        self.fail_in: int | None = None
        self.away = False
        self.writes = 0

    def state(self, name: str) -> ModelState:
        self._up()
        if name != "delay":
            raise UnknownModelError(f"no model {name!r}")
        return ModelState(name, dict(self.tags), dict(self.aliases))

    def version(self, name: str, version: str) -> VersionInfo:
        self._up()
        if version not in self.version_tags:
            raise UnknownModelError(f"no version {version!r}")
        return VersionInfo(name, version, "", run_id="r", tags=dict(self.version_tags[version]))

    def versions(self, name: str) -> list[VersionInfo]:
        return [self.version(name, version) for version in self.version_tags]

    def set_tag(self, name: str, key: str, value: str, version: str | None = None) -> None:
        self._write()
        (self.tags if version is None else self.version_tags[version])[key] = value

    def delete_tag(self, name: str, key: str, version: str | None = None) -> None:
        self._write()
        (self.tags if version is None else self.version_tags[version]).pop(key, None)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        self._write()
        self.aliases[alias] = version

    def log_artifact(self, info: VersionInfo, file: Path, folder: str) -> None:
        self._up()
        self.files.append(f"{folder}/{file.name}:{len(file.read_text().splitlines())}")

    def _up(self) -> None:
        if self.away:
            raise RegistryError("the registry does not answer")

    def _write(self) -> None:
        self._up()
        self.writes += 1
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.away = True
                raise RegistryError("the registry does not answer")


def filled() -> Faulty:
    """A model with three versions, of which the first serves."""
    shelf = Faulty()
    shelf.aliases = {"champion": "1"}
    shelf.version_tags = {"1": {}, "2": {}, "3": {}}
    return shelf
