"""Calls to placed nodes through Serve's handles.

Errors of our own tree come back as themselves, the end of a replica as one to try again after.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from twinpath.errors import RetryLaterError
from twinpath.graph.columns import Columns, Outcome, RowError, joined, row_count
from twinpath.graph.context import DEADLINE_S
from twinpath.graph.plan import Step
from twinpath.graph.stage import NodeCall
from twinpath.graph.streaming import StreamCall

#: How long a readiness probe waits for a placed node's answer.
PROBE_S = 1.0


def routes_rows(step: Step) -> bool:
    """Whether the rows of a batch go to replicas one by one: for engines, where a row's work is
    worth a call, and its prompt says which replica has seen its beginning."""
    several = step.placement is not None and step.placement.replicas.max > 1
    return several and getattr(step.node, "routed_by", None) is not None


def remote(handle: Any, by_row: bool, node: str) -> NodeCall:
    """The call of ``predict`` of a placed node, by its name; each row by itself with ``by_row``. A
    replica that ends, or takes no more, fails the rows that it was given: others of their batch go
    on."""

    async def call(columns: Columns) -> Outcome:
        deadline_s = DEADLINE_S.get()
        # Seconds that are left: the clock of another machine is another one.
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        try:
            outcome: Outcome = await _answer(handle.remote(columns, left_s))
        except RetryLaterError as error:
            failed = RowError(error.code, error.message, node)
            return Outcome.failure(failed, row_count(columns))
        return outcome

    async def call_by_row(columns: Columns) -> Outcome:
        rows = range(row_count(columns))
        parts = [{name: values[i : i + 1] for name, values in columns.items()} for i in rows]
        return joined(await asyncio.gather(*map(call, parts)))

    return call_by_row if by_row else call


def streamed(handle: Any) -> StreamCall:
    """The same of its ``stream``."""
    many = handle.options(stream=True)

    async def call(columns: Columns) -> AsyncIterator[Columns]:
        async with aclosing(parts_of(many.stream.remote(columns))) as parts:
            async for part in parts:
                yield part

    return call


async def parts_of(response: Any) -> AsyncGenerator[Any]:
    """What a streamed call yields. Whoever closes this ends the call in the replica."""
    from ray.exceptions import RayError

    try:
        async for part in response:
            yield part
    except RayError as error:
        raise _ours(error) from None
    finally:
        response.cancel()


async def answers(handle: Any) -> bool:
    """Whether any replica says that it is ready."""
    response = handle.ready.remote()
    try:
        return bool(await asyncio.wait_for(_answer(response), PROBE_S))
    except Exception:
        response.cancel()
        return False


async def _answer(response: Any) -> Any:
    from ray.exceptions import RayError

    try:
        return await response
    except RayError as error:
        raise _ours(error) from None


def _ours(error: Any) -> Exception:
    from ray.exceptions import RayTaskError

    if not isinstance(error, RayTaskError):
        return RetryLaterError("a replica ended before it had answered: try again")
    return error.cause if isinstance(error.cause, Exception) else error
