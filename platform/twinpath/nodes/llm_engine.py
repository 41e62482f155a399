"""A vLLM engine as part of a node: its arguments, its life, its health and its OpenAI app."""

import dataclasses
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from twinpath.errors import ConfigError, MissingExtraError, RetryLaterError, did_you_mean
from twinpath.graph.node import Node
from twinpath.nodes.llm_admission import admit_in_groups
from twinpath.nodes.llm_frontend import count_tokens, first_tokens_first, shorten
from twinpath.nodes.llm_guard import EngineGuard
from twinpath.nodes.llm_load import EngineLoad
from twinpath.nodes.llm_memory import HEADROOM

#: vLLM's executor of a worker in the engine's own process.
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


class EngineNode(Node):
    """Base of nodes on vLLM's ``AsyncLLM``.

    ``engine`` are fields of vLLM's ``AsyncEngineArgs``, ``openai`` of its ``FrontendArgs`` (tool
    parsers, chat template, …), ``environment`` variables for the engine's processes, such as
    ``VLLM_CPU_KVCACHE_SPACE``. ``loras`` are adapters by name. ``setup`` raises ConfigError for
    arguments that vLLM does not know or accept, with their names; MissingExtraError without vLLM.

    The engine's processes end with this one, however it ends; see `llm_guard`.
    """

    #: Batches that may run at once: the engine itself joins them, token by token.
    max_inflight = 256

    def __init__(
        self,
        model: str,
        *,
        engine: Mapping[str, Any] | None = None,
        openai: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        loras: Mapping[str, str] | None = None,
    ) -> None:
        self.model = str(model)
        self.engine_options = dict(engine or {})
        self.openai_options = dict(openai or {})
        self.environment = {key: str(value) for key, value in (environment or {}).items()}
        self.loras = {name: str(path) for name, path in (loras or {}).items()}
        #: vLLM's engine, once set up.
        self.engine: Any = None
        #: What its scheduler said last.
        self.load = EngineLoad()
        self._arguments_of_engine: Any = None
        self._guard: EngineGuard | None = None

    def setup(self) -> None:
        """Start the engine. Takes a while: vLLM's import, weights, warm-up."""
        os.environ.update(self.environment)
        vllm_()
        from vllm import envs

        envs.disable_envs_cache()  # of another engine in this process
        arguments = engine_arguments(self.model, self.engine_options, len(self.loras))
        _spare_a_process(arguments)
        _leave_headroom(arguments, self.engine_options)
        self._arguments_of_engine = arguments
        self._guard = EngineGuard()
        try:
            self.engine = _without_loop(lambda: self._started(arguments))
            shorten(self.engine.renderer)
            admission = admit_in_groups(self.engine)
            first_tokens_first(self.engine, admission.saw if admission else None)
            # Else vLLM reads its variables from the environment again, for every token.
            envs.enable_envs_cache()
        except BaseException:
            self.teardown()
            raise

    def _started(self, arguments: Any) -> Any:
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        assert self._guard is not None
        count_tokens()
        try:
            # Where nothing else is said, as many sequences and tokens a step as `vllm serve` takes.
            config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        except refusals() as error:
            raise ConfigError(f"vLLM refuses the engine of model {self.model!r}: {error}") from None
        before = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        # A forked process shows the environment of its parent's start, without the marker; and
        # forking a process with threads is asking for deadlocks.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        try:
            with self._guard.marking():
                return AsyncLLM.from_vllm_config(
                    config,
                    disable_log_stats=arguments.disable_log_stats,
                    enable_log_requests=arguments.enable_log_requests,
                    stat_loggers=None if arguments.disable_log_stats else [self.load.logger],
                )
        finally:
            if before is None:
                os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
            else:
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = before

    def teardown(self) -> None:
        """End the engine and every process of it."""
        engine, self.engine = self.engine, None
        guard, self._guard = self._guard, None
        try:
            if engine is not None:
                _end(engine)
        finally:
            if guard is not None:
                guard.end()
            # Joins those that have ended, which would stay behind as zombies.
            multiprocessing.active_children()

    def check_health(self) -> None:
        """Raises RetryLaterError when the engine is not there, or dead: another replica may
        answer, and this one has to be replaced."""
        if self.engine is None or self.engine.errored:
            raise RetryLaterError(
                f"the engine of model {self.model!r} has ended; it is being replaced: try again"
            )

    def identity(self) -> dict[str, Any]:
        """What this node's answers follow from, in plain JSON: a batch job that is begun with one
        model is not finished with another. Engine options are none of it: one that had too little
        memory goes on with fewer sequences."""
        return {"model": self.model, "loras": self.loras}

    def engine_processes(self) -> list[int]:
        """Ids of the processes of the engine, for tests and operators."""
        return [] if self._guard is None else self._guard.processes()

    async def sleep(self, level: int = 1) -> None:
        """Free the GPU: weights go to the host's memory (1) or are dropped (2). Raises ConfigError
        where the engine cannot."""
        self.check_health()
        if not getattr(self.engine.model_config, "enable_sleep_mode", False):
            raise ConfigError(
                f"the engine of model {self.model!r} cannot sleep: start it with "
                "engine={'enable_sleep_mode': True}, on a GPU (vLLM has no sleep mode on a CPU)"
            )
        await self.engine.sleep(level)

    async def wake_up(self) -> None:
        """Undo `sleep`."""
        self.check_health()
        await self.engine.wake_up()

    async def openai_app(self) -> Any:
        """The ASGI app that ``vllm serve`` would serve of this engine, mounted nowhere yet."""
        from twinpath.nodes.llm_openai import openai_app

        return await openai_app(
            self.engine, self._arguments_of_engine, self.openai_options, self.loras
        )

    def sequences(self) -> int:
        """Sequences that wait or run in the engine."""
        return 0 if self.engine is None else int(self.engine.get_num_unfinished_requests())


def _spare_a_process(arguments: Any) -> None:
    """On a CPU vLLM runs a single worker in a process of its own, since it binds that to cores, and
    both that and the engine's poll all the time. Where it is told not to bind any, the worker can
    be in the engine's process, as it is on a GPU."""
    from vllm.platforms import current_platform

    alone = (
        arguments.tensor_parallel_size * arguments.pipeline_parallel_size
        == arguments.data_parallel_size
        == 1
    )
    unbound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
    chosen = arguments.distributed_executor_backend is not None
    if alone and unbound and not chosen and current_platform.is_cpu():
        # By this name: vLLM takes the short one to be its own default, and changes that.
        arguments.distributed_executor_backend = ONE_PROCESS


def _leave_headroom(arguments: Any, options: Mapping[str, Any]) -> None:
    """vLLM takes 92 % of the card, or of the host where the cache has no size of its own, and does
    not start where that is not free: what a plan keeps free stays free."""
    if "gpu_memory_utilization" not in options:
        arguments.gpu_memory_utilization = 1 - HEADROOM


def vllm_() -> Any:
    """The package ``vllm``. Raises MissingExtraError."""
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        if error.name != "vllm":
            raise
        raise MissingExtraError("vllm", "llm") from None


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for arguments that it does not accept."""
    from vllm.exceptions import VLLMError

    return VLLMError, ValueError, TypeError, OSError


def engine_arguments(model: str, options: Mapping[str, Any], loras: int = 0) -> Any:
    """vLLM's ``AsyncEngineArgs``. Raises ConfigError for what is none of its fields."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = {field.name: field for field in dataclasses.fields(AsyncEngineArgs) if field.init}
    known = set(fields)
    for name in options:
        if name not in known or name == "model":
            raise ConfigError(
                f"engine option {name!r} of model {model!r} is none of vLLM's engine arguments."
                f"{_closest(name, known)}"
            )
    given = dict(options)
    if loras:
        given.setdefault("enable_lora", True)
        # On a CPU vLLM 0.32 gives rows without an adapter the last slot, where it has batches of
        # both kinds: one slot more than adapters, and it stays empty.
        given.setdefault("max_loras", loras + 1)
    try:
        given = {name: _config(fields[name], value) for name, value in given.items()}
        return AsyncEngineArgs(model=model, **given)
    except refusals() as error:
        raise ConfigError(f"engine options of model {model!r}: {error}") from None


def _config(field: Any, value: Any) -> Any:
    """A mapping as the config class that stands at this field of the arguments, if one does."""
    if not isinstance(value, Mapping) or field.default_factory is dataclasses.MISSING:
        return value
    default: Any = field.default_factory()
    if not dataclasses.is_dataclass(default):
        return value
    kind: Any = type(default)
    return kind(**value)


def _closest(name: str, known: set[str]) -> str:
    text = did_you_mean(name, known)
    return text if text.startswith(" Did") else " See `vllm serve --help`, with '_' for '-'."


def _end(engine: Any) -> None:
    from vllm.utils.async_utils import cancel_task_threadsafe

    # Else it takes the end of the engine for a failure, and logs one.
    if engine.output_handler is not None:
        cancel_task_threadsafe(engine.output_handler)
    engine.shutdown(timeout=5)


def _without_loop(call: Callable[[], Any]) -> Any:
    """The call's result, from a thread without event loop: an engine that is made inside one stays
    bound to it, and nodes may be set up in another one than they run in."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="engine-start")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
