"""A request router of Serve that takes turns, to compare others with."""

from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter


class TakeTurns(RequestRouter):
    """Each request to the next replica."""

    def initialize_state(self, **_: Any) -> None:
        """Serve's hook."""
        self._turn = 0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The next one."""
        ordered = sorted(candidate_replicas, key=lambda replica: str(replica.replica_id))
        self._turn += 1
        return [[ordered[self._turn % len(ordered)]]] if ordered else []
