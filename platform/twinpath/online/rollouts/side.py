"""The ingress's side of rollouts: what it reports, and the admin and feedback routes."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.routing import BaseRoute

from twinpath.errors import OverloadedError, RetryLaterError, TwinpathError, error_of
from twinpath.online.rollouts import admin
from twinpath.online.rollouts.args import RolloutArgs
from twinpath.online.rollouts.feedback import Feedback
from twinpath.online.rollouts.reporter import Reporter, Tell

#: How long an operator waits for the controller.
ANSWER_S = 60.0
#: Labels that may wait for a controller.
WAITING_LABELS = 10_000


class RolloutSide:
    """One for each ingress replica of a graph with registry models."""

    def __init__(
        self, nodes: Mapping[str, Any], controller: Any, replica: str, args: RolloutArgs
    ) -> None:
        self._controller, self._webhook_secret = controller, args.webhook_secret_file
        self._peers: Any = None
        self.feedback = Feedback(args.feedback_rows, args.feedback_age_s)
        self.reporter = Reporter(nodes, teller(controller), replica, args.interval_s)

    def start(self) -> None:
        """Begin to report; from within the event loop."""
        self.reporter.start()

    async def close(self) -> None:
        """Report what is left, and no more. A controller that is gone is not waited for."""
        self.reporter.stop()
        await self.reporter.once()

    def routes(self) -> list[BaseRoute]:
        """See `admin.routes`."""
        return admin.routes(self._ask, self._join, self._webhook_secret)

    def join_here(
        self, request_id: bytes, labels: list[float | None], principal: str | None
    ) -> dict[str, Any] | None:
        """Join with the scores of this replica. An error is an answer, to cross processes."""
        try:
            if self.reporter.waiting_labels + len(labels) > WAITING_LABELS:
                raise OverloadedError("too many labels wait for the controller: try again", 5.0)
            join = self.feedback.join(request_id, labels, principal)
        except TwinpathError as error:
            return {"error": {"code": error.code, "message": error.message}}
        if join is None:
            return None
        for rows in join.rows:
            self.reporter.label(rows)
        return {
            "request_id": request_id.decode("latin-1"),
            "joined": {rows.node: len(rows.labels) for rows in join.rows},
            "already_given": join.already,
        }

    async def _join(
        self, request_id: bytes, labels: list[float | None], principal: str | None
    ) -> dict[str, Any] | None:
        """The same over all replicas: the one that answered has the scores."""
        found = self.join_here(request_id, labels, principal)
        if found is None:
            answers = await self._broadcast("join_feedback", request_id, labels, principal)
            found = next((answer for answer in answers if answer is not None), None)
        if found is not None and "error" in found:
            raise error_of(found["error"]["code"], found["error"]["message"])
        return found

    async def _broadcast(self, method: str, *args: Any) -> list[Any]:
        from ray import serve

        if self._peers is None:
            context = serve.get_replica_context()
            self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        for _ in range(50):  # a new handle has to learn of the replicas first
            answers = await self._peers.broadcast(method, *args).results_async(timeout_s=5)
            if answers:
                return list(answers)
            await asyncio.sleep(0.1)
        raise RetryLaterError("the other replicas could not be asked: try again")

    async def _ask(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        response = self._controller.ask.remote(operation, arguments)
        try:
            found: dict[str, Any] = await asyncio.wait_for(_of(response), ANSWER_S)
        except TwinpathError:
            raise
        except Exception as error:
            response.cancel()
            raise RetryLaterError(
                f"the controller of rollouts does not answer ({type(error).__name__}); it is being "
                "started anew, and nothing is lost: try again"
            ) from None
        return found


def teller(controller: Any) -> Tell:
    """Reports through a Serve handle of the controller."""

    async def tell(*report: Any) -> Any:
        response = controller.report.remote(*report)
        try:
            return await _of(response)
        except BaseException:
            response.cancel()
            raise

    return tell


async def _of(response: Any) -> Any:
    return await response
