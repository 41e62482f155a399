"""Rows as requests to an engine: asked at once, each with an answer or an error of its own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import numpy as np

from twinpath.errors import RetryLaterError, RowFailedError, TwinpathError
from twinpath.graph.columns import ROW_ERROR, Columns, RowError


async def last(outputs: AsyncIterator[Any]) -> Any:
    """The last of what comes; None where nothing does."""
    found = None
    async for output in outputs:
        found = output
    return found


async def each(
    n: int, answer: Callable[[int], Awaitable[Any]], check_health: Callable[[], None]
) -> tuple[list[Any], Columns]:
    """Answers of n rows at once, None for a row that failed, and the column of errors, if any.
    Raises RetryLaterError when the engine ended meanwhile."""
    found = await asyncio.gather(*(answer(row) for row in range(n)), return_exceptions=True)
    errors = np.full(n, None, dtype=object)
    answers: list[Any] = []
    for row, result in enumerate(found):
        if isinstance(result, Exception):
            check_health()
            error = row_error(result)
            errors[row] = RowError(error.code, error.message)
        elif isinstance(result, BaseException):
            raise result
        answers.append(None if isinstance(result, Exception) else result)
    failed = any(error is not None for error in errors)
    return answers, {ROW_ERROR: errors} if failed else {}


def row_error(error: Exception) -> TwinpathError:
    """Why an engine has no answer to a row. RetryLaterError where it is only busy."""
    if isinstance(error, TwinpathError):
        return error
    if getattr(error, "http_status", None) == HTTPStatus.SERVICE_UNAVAILABLE:
        return RetryLaterError(f"the engine takes no more for now (max_num_queued_reqs): {error}")
    # vLLM's EngineGenerateError says nothing by itself.
    told = error.__cause__ if not str(error) and error.__cause__ is not None else error
    return RowFailedError(f"the engine refused the row: {type(told).__name__}: {told}")


def finished(output: Any) -> Any:
    """An output of an engine. Raises RowFailedError for one that tells of a failure in the engine,
    as ``vllm serve`` does: it ends a sequence so whose grammar it could not compile."""
    if any(part.finish_reason == "error" for part in output.outputs):
        raise RowFailedError(
            "the engine could not go on with the row (vLLM's finish_reason 'error'): its log says "
            "why, such as a grammar that does not compile"
        )
    return output
