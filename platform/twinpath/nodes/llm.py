"""Large language models as nodes: `LLM` writes text, `Embed` vectors, `Classify` probabilities.

Each row is a request of its own to a vLLM engine in this node's process, so that the engine batches
them continuously, with those of other batches. Rows that the engine refuses (a prompt that is too
long, a schema that it cannot compile) fail alone.
"""

import json
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np

from twinpath.errors import ConfigError, InputError, did_you_mean
from twinpath.graph.columns import Columns, row_count
from twinpath.nodes.llm_engine import EngineNode, refusals, vllm_
from twinpath.nodes.llm_rows import each, finished, last, row_error
from twinpath.nodes.llm_usage import COST


class LLM(EngineNode):
    """``prompt`` or ``messages`` → ``text``, ``finish_reason``, ``prompt_tokens``,
    ``completion_tokens`` (int64).

    ``prompt`` names a column of text; ``messages`` one of chats instead, each JSON text or a list
    of ``{"role", "content"}``, put through the model's chat template. ``sampling`` are fields of
    vLLM's ``SamplingParams``; ``structured_outputs`` among them is one of ``{"json": schema}``,
    ``{"regex": …}``, ``{"choice": […]}``, ``{"grammar": …}``. ``by_row`` maps such fields to the
    columns that have them. ``lora`` names a column with the adapter of each row ("" is none).
    ``output`` renames the column ``text``. With several replicas prompts that begin alike go to the
    same one, and so do those of a session, by the column ``session``.
    """

    def __init__(
        self,
        model: str,
        *,
        prompt: str = "prompt",
        messages: str | None = None,
        output: str = "text",
        sampling: Mapping[str, Any] | None = None,
        by_row: Mapping[str, str] | None = None,
        lora: str | None = None,
        loras: Mapping[str, str] | None = None,
        session: str | None = None,
        engine: Mapping[str, Any] | None = None,
        openai: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, engine=engine, openai=openai, environment=environment, loras=loras)
        self.messages, self.prompt = messages, prompt
        self.output = output
        self.sampling, self.by_row = dict(sampling or {}), dict(by_row or {})
        self.lora = lora
        if lora is not None and not self.loras:
            raise ConfigError(f"lora={lora!r} needs loras={{name: folder}}: there are none")
        if self.sampling.get("n", 1) != 1 or "n" in self.by_row:
            raise ConfigError("sampling n: a node writes one text for a row; use the OpenAI API")
        reads = {messages or prompt: "any" if messages else "str"}
        reads |= dict.fromkeys(self.by_row.values(), "any")
        if lora is not None:
            reads[lora] = "str"
        if session is not None:
            reads[session] = "any"
        #: Which columns say where a row is best sent; see `online.prefix_router`.
        self.routed_by = {"column": messages or prompt, "session": session}
        self.inputs = reads  # type: ignore[misc]
        self.outputs = {  # type: ignore[misc]
            output: "str", "finish_reason": "str", "prompt_tokens": "int64",
            "completion_tokens": "int64",
        }  # fmt: skip

    def setup(self) -> None:
        """Start the engine; sampling parameters are checked before."""
        self._check_sampling()
        super().setup()

    async def predict(self, columns: Columns) -> Columns:
        """One text for each row."""
        self.check_health()

        async def answer(row: int) -> Any:
            return await last(self._generate(columns, row, final_only=True))

        answers, errors = await each(row_count(columns), answer, self.check_health)
        parts = [None if a is None else a.outputs[0] for a in answers]
        read = _counts(0 if a is None else len(a.prompt_token_ids or ()) for a in answers)
        written = _counts(0 if p is None else len(p.token_ids) for p in parts)
        return {
            self.output: _objects("" if p is None else p.text for p in parts),
            "finish_reason": _objects("" if p is None else p.finish_reason or "" for p in parts),
            "prompt_tokens": read,
            "completion_tokens": written,
            COST: read + written,
        } | errors

    async def stream(self, columns: Columns) -> AsyncIterator[Columns]:
        """The text of one row as it comes: batches of one row whose text is what is new; the last
        one has the finish reason and the counts. Raises RowFailedError for what the engine
        refuses, RetryLaterError where it takes no more for now."""
        self.check_health()
        if row_count(columns) != 1:
            raise InputError(f"one row can be streamed at a time, got {row_count(columns)}")
        written = 0
        try:
            async for output in self._generate(columns, 0, final_only=False):
                part = output.outputs[0]
                written += len(part.token_ids)
                read = len(output.prompt_token_ids or ())
                yield {
                    self.output: _objects([part.text]),
                    "finish_reason": _objects([part.finish_reason or ""]),
                    "prompt_tokens": _counts([read]),
                    "completion_tokens": _counts([written]),
                    COST: _counts([read + written]),
                }
        except Exception as error:
            self.check_health()
            raise row_error(error) from error

    async def _generate(
        self, columns: Columns, row: int, *, final_only: bool
    ) -> AsyncIterator[Any]:
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        given = dict(self.sampling)
        for field, column in self.by_row.items():
            value = _plain(columns[column][row])
            if value is not None:
                given[field] = value
        params = sampling_params(given)
        params.output_kind = RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.DELTA
        adapter = None
        if self.lora is not None and (name := str(columns[self.lora][row] or "")):
            if name not in self.loras:
                raise InputError(f"no adapter {name!r}.{did_you_mean(name, self.loras)}")
            adapter = LoRARequest(name, 1 + list(self.loras).index(name), self.loras[name])
        prompt = await self._rendered(columns, row)
        async for output in self.engine.generate(
            prompt, params, uuid.uuid4().hex, lora_request=adapter
        ):
            yield finished(output)

    async def _rendered(self, columns: Columns, row: int) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.renderers.params import ChatParams

        renderer = self.engine.renderer
        if self.messages is None:
            text = columns[self.prompt][row]
            if not isinstance(text, str) or not text:
                raise InputError(f"column {self.prompt!r}: expected text, got {text!r}")
            parsed = parse_model_prompt(self.engine.model_config, text)
            return (await renderer.render_cmpl_async([parsed]))[0]
        chat = columns[self.messages][row]
        if isinstance(chat, str):
            try:
                chat = json.loads(chat)
            except ValueError as error:
                raise InputError(f"column {self.messages!r} is no JSON: {error}") from None
        params = ChatParams(
            chat_template=self.openai_options.get("chat_template"),
            chat_template_kwargs={"add_generation_prompt": True},
        )
        _, prompts = await renderer.render_chat_async([list(chat)], params)
        return prompts[0]

    def identity(self) -> dict[str, Any]:
        """Also what is asked of the model."""
        asked = [self.messages, self.prompt, self.sampling, self.by_row, self.lora]
        return super().identity() | {"asked": json.loads(json.dumps(asked, default=repr))}

    def _check_sampling(self) -> None:
        vllm_()
        from vllm import SamplingParams

        known = set(SamplingParams.__struct_fields__)
        for name in (*self.sampling, *self.by_row):
            if name not in known or name.startswith("_"):
                raise ConfigError(
                    f"sampling parameter {name!r} is none of vLLM's.{did_you_mean(name, known)}"
                )
        try:
            sampling_params(self.sampling)
        except refusals() as error:
            raise ConfigError(f"sampling {self.sampling!r}: {error}") from None


class _Pooling(EngineNode):
    """Text → an array of floats for each row, by vLLM's pooling ``task``."""

    task = "embed"

    def __init__(
        self,
        model: str,
        *,
        text: str = "text",
        output: str,
        engine: Mapping[str, Any] | None = None,
        openai: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            model,
            engine={"runner": "pooling", **(engine or {})},
            openai=openai,
            environment=environment,
        )
        self.text, self.output = text, output
        self.inputs = {text: "str"}  # type: ignore[misc]
        self.outputs = {output: "any"}  # type: ignore[misc]

    async def predict(self, columns: Columns) -> Columns:
        """``output``: float32 (n, size)."""
        from vllm import PoolingParams
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        self.check_health()

        async def vector(row: int) -> Any:
            text = columns[self.text][row]
            if not isinstance(text, str) or not text:
                raise InputError(f"column {self.text!r}: expected text, got {text!r}")
            parsed = parse_model_prompt(self.engine.model_config, text)
            prompt = (await self.engine.renderer.render_cmpl_async([parsed]))[0]
            params = PoolingParams(task=self.task)
            found = await last(self.engine.encode(prompt, params, uuid.uuid4().hex))
            if found is None:
                return None
            return found.outputs.data.float().numpy(), len(found.prompt_token_ids or ())

        answers, errors = await each(row_count(columns), vector, self.check_health)
        found = [None if answer is None else answer[0] for answer in answers]
        read = _counts(0 if answer is None else answer[1] for answer in answers)
        size = next((len(values) for values in found if values is not None), 0)
        rows = [np.full(size, np.nan, np.float32) if v is None else v for v in found]
        return {self.output: np.stack(rows).astype(np.float32), COST: read} | errors


class Embed(_Pooling):
    """``text`` → ``embedding``, float32 (n, size), of unit length where the model says so."""

    def __init__(self, model: str, *, text: str = "text", output: str = "embedding", **kw: Any):
        super().__init__(model, text=text, output=output, **kw)


class Classify(_Pooling):
    """``text`` → ``probabilities``, float32 (n, classes), of a sequence classification model; of
    one class, its score."""

    task = "classify"

    def __init__(self, model: str, *, text: str = "text", output: str = "probabilities", **kw: Any):
        super().__init__(model, text=text, output=output, **kw)


def sampling_params(given: Mapping[str, Any]) -> Any:
    """vLLM's SamplingParams. Raises one of `refusals`."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    fields = dict(given)
    structured = fields.get("structured_outputs")
    if isinstance(structured, Mapping):
        fields["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(**fields)


def _objects(values: Any) -> np.ndarray:
    listed = list(values)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


def _counts(values: Any) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's own; NaN as None, which is "not given"."""
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and plain != plain else plain
