"""What becomes of rows that an engine does not answer; no engine runs here."""

from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twinpath.errors import ConfigError, InputError, RetryLaterError, RowFailedError
from twinpath.graph.columns import ROW_ERROR, RowError
from twinpath.nodes.llm import LLM
from twinpath.nodes.llm_engine import EngineNode
from twinpath.nodes.llm_rows import each, finished, row_error


class BusyError(Exception):
    """As vLLM's QueueOverflowError is."""

    http_status = HTTPStatus.SERVICE_UNAVAILABLE


def part(reason: str | None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])


def healthy() -> None:
    """The engine lives."""


async def test_each_row_has_its_answer_or_its_own_error():
    failures: list[Exception | None] = [
        None, BusyError("full"), InputError("no adapter 'x'"), ValueError("odd"), None,
    ]  # fmt: skip

    async def answer(row: int) -> int:
        if (failure := failures[row]) is not None:
            raise failure
        return row

    answers, columns = await each(5, answer, healthy)
    assert answers == [0, None, None, None, 4]
    errors: list[RowError | None] = columns[ROW_ERROR].tolist()
    codes = [None if error is None else error.code for error in errors]
    assert codes == [None, "retry_later", "invalid_input", "row_failed", None]
    assert errors[3] is not None
    assert errors[3].message == "the engine refused the row: ValueError: odd"


async def test_an_engine_that_has_ended_is_no_fault_of_a_row():
    async def answer(row: int) -> int:
        raise ValueError("the engine is gone")

    def ended() -> None:
        raise RetryLaterError("it has ended")

    with pytest.raises(RetryLaterError, match="it has ended"):
        await each(2, answer, ended)


def test_an_error_without_words_is_told_by_its_cause():
    silent = RuntimeError()
    silent.__cause__ = ValueError("structured_outputs is no mapping")
    error = row_error(silent)
    assert type(error) is RowFailedError
    assert error.message.endswith("ValueError: structured_outputs is no mapping")


@pytest.mark.parametrize("reason", ["stop", "length", None])
def test_what_an_engine_has_written_is_an_answer(reason):
    output = part(reason)
    assert finished(output) is output


def test_a_failure_in_the_engine_is_no_answer():
    with pytest.raises(RowFailedError, match="finish_reason 'error'"):
        finished(part("error"))


async def test_a_row_that_the_engine_gives_up_fails_whole_and_streamed(monkeypatch):
    pytest.importorskip("vllm")
    node = LLM("none")

    async def rendered(columns: Any, row: int) -> str:
        return "hello"

    async def generate(*asked: Any, **more: Any) -> Any:
        yield SimpleNamespace(
            prompt_token_ids=[1],
            outputs=[SimpleNamespace(finish_reason="error", text="", token_ids=[])],
        )

    monkeypatch.setattr(node, "_rendered", rendered)
    node.engine = SimpleNamespace(errored=False, generate=generate)
    rows = {"prompt": np.array(["hello"], dtype=object)}
    [error] = (await node.predict(rows))[ROW_ERROR]
    assert error.code == "row_failed"
    with pytest.raises(RowFailedError, match="finish_reason 'error'"):
        await anext(node.stream(rows))


def test_one_row_gets_one_text_whatever_its_columns_say():
    for options in ({"sampling": {"n": 2}}, {"by_row": {"n": "count"}}):
        with pytest.raises(ConfigError, match="a node writes one text for a row"):
            LLM("none", **options)


def test_a_job_is_told_by_its_model_and_by_what_is_asked_of_it():
    node = LLM("a", sampling={"temperature": 0.0})
    assert node.identity() == LLM("a", sampling={"temperature": 0.0}).identity()
    assert node.identity() == LLM("a", sampling={"temperature": 0.0}, engine={"seed": 1}).identity()
    others = [
        LLM("b", sampling={"temperature": 0.0}), LLM("a", sampling={"temperature": 1.0}),
        LLM("a", sampling={"temperature": 0.0}, by_row={"seed": "seed"}),
    ]  # fmt: skip
    for other in others:
        assert node.identity() != other.identity()


def test_an_engine_takes_as_much_at_a_time_as_vllm_serve_where_nothing_is_said():
    pytest.importorskip("vllm")
    from vllm.usage.usage_lib import UsageContext

    seen = []

    def create(context: UsageContext) -> None:
        seen.append(context)
        raise ValueError("enough")

    node = EngineNode("none")
    node._guard = SimpleNamespace()
    with pytest.raises(ConfigError, match="enough"):
        node._started(SimpleNamespace(create_engine_config=create))
    assert seen == [UsageContext.OPENAI_API_SERVER]
