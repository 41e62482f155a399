"""The prefix policy as a request router of Ray Serve, for placed engines behind an ingress.

Serve ships `PrefixCacheAffinityRouter`: it asks an actor for each request with a blocking call on
the router's event loop, reads ``prompt`` or ``messages`` of a request object, bounds no load unless
told, and sends what matches nothing to the replica that was sent the fewest characters. Ours keeps
its state in the handle, reads a column, and counts what is under way.
"""

from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

from twinpath.graph.columns import Columns
from twinpath.online.prefix_policy import PrefixPolicy


class PrefixRouter(RequestRouter):
    """Routes calls whose first argument is Columns of one row.

    ``column`` names the column of the prompt, ``session`` that of the session, if any; the other
    settings are the policy's.
    """

    def initialize_state(
        self, column: str = "prompt", session: str | None = None, **policy: Any
    ) -> None:
        """Serve's hook, with ``request_router_kwargs``."""
        self._column, self._session = column, session
        self._policy: PrefixPolicy[Any] = PrefixPolicy(**policy)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen replica; if it takes no more, the others."""
        if not candidate_replicas:
            return []
        columns = pending_request.args[0] if pending_request and pending_request.args else None
        if pending_request is None or not isinstance(columns, dict) or self._column not in columns:
            return [candidate_replicas]
        request = pending_request.metadata.internal_request_id
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        prompt = str(columns[self._column][0])
        chosen = self._policy.choose(
            request, prompt, sorted(by_id, key=str), self._session_of(columns)
        )
        pending_request.future.add_done_callback(
            lambda future: self._policy.ended(request) if future.cancelled() else None
        )
        others = [replica for key, replica in by_id.items() if key != chosen]
        return [[by_id[chosen]], others] if others else [[by_id[chosen]]]

    def _session_of(self, columns: Columns) -> str | None:
        """The row's session. A row whose column is empty belongs to none."""
        given = columns.get(self._session) if self._session else None
        session = None if given is None else given[0]
        return None if session is None or session == "" else str(session)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: Any, result: Any
    ) -> None:
        """Serve's hook: a replica took the request."""
        self._policy.moved(pending_request.metadata.internal_request_id, replica_id)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Serve's hook: the request ended, or an attempt to send it failed."""
        self._policy.ended(internal_request_id)
