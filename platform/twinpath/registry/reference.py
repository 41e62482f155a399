"""What names a registered model's version, and what the registry knows of one."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from twinpath.errors import ConfigError

#: Tag of a registered model: JSON of the rollout under way. Without it the alias is what serves.
ROLLOUT_TAG = "twinpath.rollout"
#: Tag of a version: sha256 of its files (see `registry.cache.digest_of`).
DIGEST_TAG = "twinpath.digest"
#: Tag of a version: why a replica refused it, as ``code: text``.
REFUSED_TAG = "twinpath.refused"
#: Tag of a registered model: the version that the default alias named before, for a rollback.
PREVIOUS_TAG = "twinpath.previous"
#: Tag of a registered model: versions, ``"3,4"``, that are kept live beside what serves, so that
#: requests can ask for them.
LIVE_TAG = "twinpath.live"
DEFAULT_ALIAS = "champion"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A registered model, by an alias or by one version of it. Raises ConfigError for both."""

    name: str
    alias: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a model reference needs the name of a registered model")
        if self.alias is not None and self.version is not None:
            raise ConfigError(
                f"model {self.name!r}: alias {self.alias!r} and version {self.version!r} are both "
                "given: name one"
            )
        if self.version is not None and not str(self.version).isdigit():
            raise ConfigError(
                f"model {self.name!r}: version {self.version!r} is no number: versions are 1, 2, …"
            )

    def __str__(self) -> str:
        if self.version is not None:
            return f"models:/{self.name}/{self.version}"
        return f"models:/{self.name}@{self.alias or DEFAULT_ALIAS}"


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One version as the registry has it. ``created_s`` is in seconds since 1970.

    ``digest`` is None unless whoever registered the version noted it.
    """

    name: str
    version: str
    source: str
    status: str = "READY"
    run_id: str | None = None
    created_s: float = 0.0
    description: str = ""
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str | None:
        """``sha256:…`` of its files, if it was noted."""
        return self.tags.get(DIGEST_TAG)

    @property
    def refused(self) -> str | None:
        """Why a replica refused it, if one did."""
        return self.tags.get(REFUSED_TAG)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A registered model in one reading: tags, and the version behind each alias."""

    name: str
    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    description: str = ""

    @property
    def rollout(self) -> str | None:
        """JSON of the rollout under way, if there is one."""
        return self.tags.get(ROLLOUT_TAG) or None
