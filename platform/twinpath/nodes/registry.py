"""RegistryModel: a node whose model is whatever the registry says should serve."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns
from twinpath.graph.node import Node


class RegistryModel(Node):
    """A registered model, by alias (default ``champion``) or by version; see `docs/registry.md`.

    Controllers talk to its copies in all replicas through ``commands``: each is a method that may
    be called by name with plain arguments and returns plain data (JSON).
    """

    #: Methods that `online.replicas` lets a controller call by name.
    commands: ClassVar[tuple[str, ...]] = ("status", "drain_reports", "apply")
    #: Whether a request may pin a version: pins come as the reserved column `PIN`.
    pins: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        alias: str | None = None,
        version: str | int | None = None,
        tracking_uri: str | None = None,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        key: str | Sequence[str] | None = None,
        segments: Sequence[str] = (),
        policy: str = "availability",
        trusted: Sequence[str] = (),
        model_version: str | None = None,
    ) -> None:
        raise ConfigError("being written")

    def status(self) -> dict[str, Any]:
        """``{"model", "serving", "registry": {"reachable", "age_s", "problem"}, "rollout": {…} |
        None, "versions": [{"version", "state", "reason", "bytes", "inflight", "digest"}]}``."""
        raise NotImplementedError

    def drain_reports(self) -> dict[str, Any]:
        """What was recorded since the last call: E's report by version and segment, as JSON."""
        raise NotImplementedError

    def apply(self, state: str | None) -> bool:
        """Take this rollout state (JSON of RolloutState; None ends it) now, ahead of the next
        poll. True if it was newer than what the node had."""
        raise NotImplementedError

    def predict(self, columns: Columns) -> Columns:
        """Rows grouped by version, scored, and put back in order."""
        raise NotImplementedError
