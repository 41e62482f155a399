"""What operators change about models in the registry, each a few tags or an alias."""

from typing import Any, Protocol

from twinpath.errors import RolloutError
from twinpath.registry.reference import (
    DEFAULT_ALIAS,
    LIVE_TAG,
    PREVIOUS_TAG,
    REFUSED_TAG,
    ModelState,
    VersionInfo,
)


class Shelf(Protocol):
    """What is needed of `registry.client.Registry`."""

    def state(self, name: str) -> ModelState:
        """Tags and aliases of a model."""

    def version(self, name: str, version: str) -> VersionInfo:
        """One version of a model."""

    def versions(self, name: str) -> list[VersionInfo]:
        """All versions of a model."""

    def set_tag(self, name: str, key: str, value: str, version: str | None = None) -> None:
        """Set a tag of a model, or of one of its versions."""

    def delete_tag(self, name: str, key: str, version: str | None = None) -> None:
        """Take a tag away."""

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias name this version."""


def described(registry: Shelf, name: str) -> dict[str, Any]:
    """A model and its versions, newest first, in JSON types. Raises UnknownModelError."""
    state = registry.state(name)
    return {
        "model": name,
        "description": state.description,
        "aliases": dict(state.aliases),
        "live": live_versions(state.tags.get(LIVE_TAG, "")),
        "previous": state.tags.get(PREVIOUS_TAG),
        "versions": [
            {
                "version": each.version,
                "aliases": [a for a, v in state.aliases.items() if v == each.version],
                "created_s": each.created_s,
                "run_id": each.run_id,
                "digest": each.digest,
                "refused": each.refused,
            }
            for each in registry.versions(name)
        ],
    }


def promote(registry: Shelf, name: str, version: str, alias: str = DEFAULT_ALIAS) -> None:
    """Let an alias name a version; what it named before is noted, for :func:`roll_back`.

    Raises RolloutError for a version that was refused.
    """
    refused = registry.version(name, version).tags.get(REFUSED_TAG)
    if refused:
        raise RolloutError(f"version {version} of {name!r} was refused: {refused}")
    before = registry.state(name).aliases.get(alias)
    if before == version:
        return
    if before is not None and alias == DEFAULT_ALIAS:
        registry.set_tag(name, PREVIOUS_TAG, before)
    registry.set_alias(name, alias, version)


def roll_back(registry: Shelf, name: str) -> str:
    """Let the default alias name the version that it named before; which that is.

    Raises RolloutError if none is noted.
    """
    state = registry.state(name)
    previous = state.tags.get(PREVIOUS_TAG)
    if not previous:
        raise RolloutError(
            f"model {name!r} has no version before the one that serves: promote one by its number"
        )
    serving = state.aliases.get(DEFAULT_ALIAS)
    if serving is not None and serving != previous:
        registry.set_tag(name, PREVIOUS_TAG, serving)
    registry.set_alias(name, DEFAULT_ALIAS, previous)
    return previous


def pin(registry: Shelf, name: str, version: str, keep: bool = True) -> list[str]:
    """Keep a version live beside what serves, so that requests can ask for it; or (``keep``
    False) no longer. The versions that are kept now."""
    registry.version(name, version)
    kept = live_versions(registry.state(name).tags.get(LIVE_TAG, ""))
    wanted = [each for each in kept if each != version] + ([version] if keep else [])
    if wanted:
        registry.set_tag(name, LIVE_TAG, ",".join(wanted))
    else:
        registry.delete_tag(name, LIVE_TAG)
    return wanted


def live_versions(text: str) -> list[str]:
    """The versions of the tag `LIVE_TAG`."""
    return [part.strip() for part in text.split(",") if part.strip().isdigit()]
