"""Does a model fit on a card? Plain arithmetic on its files; nothing is loaded, no engine started.

For each tensor-parallel rank, of the pipeline stage that has most:

* **weights**: of the files that vLLM loads (`llm_weights`), matrices divided by the ranks, vectors
  whole, as Megatron-LM does (Shoeybi et al. 2019, arXiv:1909.08053);
* **KV cache**: 2 · layers · kv_heads · head_dim · bytes for each token (Kwon et al. 2023,
  arXiv:2309.06180; grouped heads: Ainslie et al. 2023, arXiv:2305.13245), or layers ·
  (kv_lora_rank + qk_rope_head_dim) · bytes with latent attention (DeepSeek-V2, arXiv:2405.04434);
* **working memory**: an estimate of the largest activations and of the logits that are sampled.

Sliding windows and hybrid layers need less than this: it is an upper bound for them.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from twinpath.errors import ConfigError, MemoryPlanError, MissingExtraError
from twinpath.nodes.llm_weights import ModelShape, read_shape

_LOG = logging.getLogger(__name__)
#: Part of the memory that is left free unless said otherwise: fragments, graphs, other processes.
HEADROOM = 0.125
#: Less is refused.
LEAST_HEADROOM = 0.1
GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """What ``versions`` engines on one card need, in bytes, against what it has.

    ``kv_bytes`` is what the wanted sequences need; :attr:`spare_tokens` says for how many tokens
    the rest would do. ``share`` is the part of the card that each engine is told to take
    (``gpu_memory_utilization``), None where it is not told; ``sized`` says that its cache has a
    size of its own. Then it only has to find the share free when it starts.
    """

    model: str
    total_bytes: int
    headroom: float
    versions: int
    ranks: int
    stages: int
    weights_bytes: int
    working_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    sequences: int
    tokens_per_sequence: int
    share: float | None = None
    sized: bool = False

    @property
    def usable_bytes(self) -> int:
        """The memory less the headroom."""
        return int(self.total_bytes * (1 - self.headroom))

    @property
    def needed_bytes(self) -> int:
        """All versions together, on one rank's card."""
        return self.versions * self._each_bytes

    @property
    def _each_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        """Whether that, and what the engines are told to take, leaves the headroom free; and
        whether each engine has enough in what it is told to take."""
        if self.share is None:
            return self.needed_bytes <= self.usable_bytes
        return not self._too_little and self.versions * self.share <= 1 - self.headroom + 1e-9

    @property
    def spare_tokens(self) -> int:
        """Tokens of KV cache for each version when it is given all that is left."""
        fixed = self.weights_bytes + self.working_bytes
        rest = self.usable_bytes // self.versions - fixed
        return max(0, rest // self.kv_bytes_per_token) if self.kv_bytes_per_token else 0

    @property
    def utilization(self) -> float:
        """``gpu_memory_utilization`` for each engine, so that all of them leave the headroom."""
        return math.floor(100 * (1 - self.headroom) / self.versions) / 100

    def shortened(self, space_bytes: int = 0) -> "MemoryPlan":
        """This plan with sequences as long as fit, at most as they are: for an engine that is to
        find its ``max_model_len``. ``space_bytes`` is what its cache takes, where it has a size."""
        if not self.kv_bytes_per_token:
            return self
        whole = self.usable_bytes // self.versions
        share = whole if self.share is None else int(self.share * self.total_bytes)
        room = space_bytes or min(whole, share) - self.weights_bytes - self.working_bytes
        fits = room // (self.sequences * self.kv_bytes_per_token)
        length = min(self.tokens_per_sequence, max(1, fits))
        needed = max(space_bytes, self.sequences * length * self.kv_bytes_per_token)
        return dataclasses.replace(self, tokens_per_sequence=length, kv_bytes=needed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = (
            "model", "total_bytes", "headroom", "usable_bytes", "versions", "ranks", "stages",
            "weights_bytes", "working_bytes", "kv_bytes", "kv_bytes_per_token", "sequences",
            "tokens_per_sequence", "share", "needed_bytes", "spare_tokens", "utilization", "fits",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def _too_little(self) -> bool:
        """Whether an engine is told to take less than it needs."""
        told = self.share is not None and not self.sized
        return told and self._each_bytes > (self.share or 0) * self.total_bytes

    def check(self) -> "MemoryPlan":
        """This plan. Raises MemoryPlanError, with the numbers, when it does not fit."""
        if self.fits:
            return self
        parts = (
            f"weights {_gib(self.weights_bytes)}, working memory {_gib(self.working_bytes)}, "
            f"KV cache {_gib(self.kv_bytes)} for {self.sequences} × {self.tokens_per_sequence} "
            "tokens"
        )
        each = f"{self.versions} versions × ({parts})" if self.versions > 1 else parts
        limit = f"can be used with {self.headroom:.1%} headroom"
        if self.needed_bytes > self.usable_bytes:
            raise MemoryPlanError(
                f"model {self.model!r} does not fit: {each} make {_gib(self.needed_bytes)}, and "
                f"{_gib(self.usable_bytes)} of {_gib(self.total_bytes)} {limit}. Use a larger "
                "tensor_parallel_size, a smaller max_model_len or model, fewer versions at a "
                "time, or kv_cache_dtype='fp8'"
            )
        given = (
            f"gpu_memory_utilization={self.share} gives each of {self.versions} engines "
            f"{_gib(int((self.share or 0) * self.total_bytes))} of {_gib(self.total_bytes)}"
        )
        if self._too_little:
            raise MemoryPlanError(
                f"model {self.model!r} does not fit: {parts} make {_gib(self._each_bytes)}, and "
                f"{given}. Up to {self.utilization:.2f} leaves the headroom"
            )
        raise MemoryPlanError(
            f"model {self.model!r} does not fit: {given}, and {_gib(self.usable_bytes)} {limit}. "
            f"{self.utilization:.2f} leaves that"
        )


def plan_memory(
    model: str | Path,
    total_bytes: int,
    *,
    engine: Mapping[str, Any] | None = None,
    versions: int = 1,
    sequences: int = 1,
    headroom: float = HEADROOM,
    kv_space_bytes: int | None = None,
    on_gpu: bool = True,
) -> MemoryPlan:
    """The plan of ``versions`` engines of a model on a card of ``total_bytes``, or on the CPUs of a
    machine that has them.

    ``engine`` are vLLM's engine arguments (``tensor_parallel_size``, ``max_model_len``, …). The KV
    cache is counted for ``sequences`` of ``max_model_len`` tokens at a time, or as
    ``kv_space_bytes`` (``kv_cache_memory_bytes``, VLLM_CPU_KVCACHE_SPACE) where that is set.
    Raises ConfigError for values that make no sense, and where sizes cannot be known.
    """
    options = dict(engine or {})
    for name, value in (("versions", versions), ("sequences", sequences), ("memory", total_bytes)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    if not LEAST_HEADROOM <= headroom < 1:
        raise ConfigError(
            f"headroom: expected a part from {LEAST_HEADROOM} to below 1, such as {HEADROOM}, got "
            f"{headroom}: what frameworks and fragments take is in no plan"
        )
    shape = read_shape(model, str(options.get("dtype") or "auto"))
    if options.get("quantization") and not shape.quantized:
        raise ConfigError(
            f"quantization {options['quantization']!r} makes the weights of {str(model)!r} smaller "
            "as they are loaded, and by how much only vLLM knows: plan without it for more than "
            "it needs, or start the engine"
        )
    ranks = _whole(options, "tensor_parallel_size", 1)
    stages = _whole(options, "pipeline_parallel_size", 1)
    kv_dtype = str(options.get("kv_cache_dtype") or "auto")
    per_token = shape.kv_bytes_per_token(ranks, stages, kv_dtype)
    # As long as fits, where the engine is to find that.
    fitted = options.get("max_model_len") in (-1, "auto")
    length = shape.max_positions
    length = length if fitted else _whole(options, "max_model_len", length)
    if length < 1:
        raise ConfigError(
            f"max_model_len: expected at least 1, or -1 for as long as fits, got {length}"
        )
    space = _whole(options, "kv_cache_memory_bytes", kv_space_bytes or 0)
    # Of no account on a CPU where the cache has a size.
    told = None if kv_space_bytes else _number(options, "gpu_memory_utilization")
    offloaded = int((_number(options, "cpu_offload_gb") or 0) * GIB)
    plan = MemoryPlan(
        model=str(model), total_bytes=int(total_bytes), headroom=headroom, versions=versions,
        ranks=ranks, stages=stages,
        weights_bytes=max(0, shape.weight_bytes(ranks, stages) - offloaded),
        working_bytes=_working_bytes(shape, options, length, int(total_bytes), on_gpu),
        kv_bytes=max(space, sequences * length * per_token),
        kv_bytes_per_token=per_token, sequences=sequences, tokens_per_sequence=length,
        share=told, sized=bool(space),
    )  # fmt: skip
    return plan.shortened(space) if fitted else plan


def _working_bytes(
    shape: ModelShape, options: Mapping[str, Any], length: int, total_bytes: int, on_gpu: bool
) -> int:
    """With the batches that vLLM makes where its arguments do not say."""
    ranks = _whole(options, "tensor_parallel_size", 1)
    sequences, tokens = batch_defaults(
        total_bytes, on_gpu, ranks * _whole(options, "pipeline_parallel_size", 1)
    )
    if options.get("performance_mode") == "throughput":
        sequences, tokens = 2 * sequences, 2 * tokens
    sequences = _whole(options, "max_num_seqs", sequences)
    # A prompt is read in parts, but by encoders, or where that is turned off.
    if not shape.caches or options.get("enable_chunked_prefill") is False:
        tokens = max(tokens, length)
    tokens = _whole(options, "max_num_batched_tokens", min(tokens, sequences * length))
    return shape.working_bytes(ranks, sequences, tokens)


def batch_defaults(total_bytes: int, on_gpu: bool, ranks: int = 1) -> tuple[int, int]:
    """Sequences at a time and tokens of a step where an engine's arguments do not say.

    Those of vLLM 0.32 (``EngineArgs.get_batch_defaults``) for ``UsageContext.OPENAI_API_SERVER``,
    in which our engines start, too. An A100 of 80 GB takes those of smaller cards: for it this is
    too much, by about 1 GiB with a vocabulary of 128,000 words.
    """
    if not on_gpu:
        return 128 * ranks, 2048 * ranks
    if total_bytes >= 160 * GIB:
        return 1024, 16384
    return (1024, 8192) if total_bytes >= 70 * GIB else (256, 2048)


def _number(options: Mapping[str, Any], name: str) -> float | None:
    value = options.get(name)
    try:
        return None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected a number, got {value!r}") from None


def _whole(options: Mapping[str, Any], name: str, default: int) -> int:
    return int(_number(options, name) or default)


def card_bytes() -> int | None:
    """Memory of the smallest GPU of this machine by NVML; None without one, or where NVML does not
    say."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return min((int(pynvml.nvmlDeviceGetMemoryInfo(h).total) for h in handles), default=None)
    except pynvml.NVMLError:  # a card whose memory is the host's
        return None
    finally:
        pynvml.nvmlShutdown()


def host_bytes() -> int:
    """Memory of this machine, or what its control group allows, where that is less. Raises
    MissingExtraError without psutil."""
    try:
        import psutil
    except ImportError:
        raise MissingExtraError("psutil", "online") from None
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def takes_card() -> bool:
    """Whether an engine whose replicas have no ``num_gpus`` runs on this machine's GPU all the
    same: vLLM takes a GPU that it sees, except its CPU build, and Ray 2.60 hides GPUs from such
    replicas only where RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1."""
    hidden = os.environ.get("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "").lower() in ("1", "true")
    return not hidden and not _cpu_build() and card_bytes() is not None


def _cpu_build() -> bool:
    """Whether the vLLM that is installed runs on CPUs only; as vLLM itself tells."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        pass
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def plan_engine(
    node: Any,
    total_bytes: int | None = None,
    *,
    engine: Mapping[str, Any] | None = None,
    versions: int = 1,
    sequences: int = 1,
    headroom: float = HEADROOM,
    num_gpus: float = 0.0,
    on_gpu: bool | None = None,
) -> MemoryPlan:
    """The plan of an engine node, with ``engine`` over its own arguments; of the memory of this
    machine, its card's where it runs on one, unless ``total_bytes`` is given. With ``num_gpus``
    below 1 it is one of as many engines as Ray puts on a card; with none it is on a card where
    `takes_card` says so, unless ``on_gpu`` is given. Raises ConfigError, also for fewer GPUs than
    the engine has ranks."""
    options = {**node.engine_options, **(engine or {})}
    if 0 < num_gpus < 1:
        versions = max(versions, math.floor(1 / num_gpus + 1e-9))
        options.setdefault("gpu_memory_utilization", 1 - HEADROOM)  # as its setup does
    _check_ranks(options, num_gpus)
    if on_gpu is None:
        on_gpu = num_gpus > 0 or takes_card()
    if total_bytes is None:
        total_bytes = card_bytes() if on_gpu else host_bytes()
    if total_bytes is None:
        raise ConfigError(
            f"num_gpus={num_gpus:g}: it runs on a GPU, and NVML finds none on this machine: give "
            "the memory of the card (--memory-gib)"
        )
    # The node's own, else that of the application (``runtime_env``) or of the machine.
    space = _number(os.environ | node.environment, "VLLM_CPU_KVCACHE_SPACE")
    return plan_memory(
        node.model, total_bytes, engine=options, versions=versions,
        sequences=sequences, headroom=headroom, on_gpu=on_gpu,
        kv_space_bytes=int(space * GIB) if space and not on_gpu else None,
    )  # fmt: skip


def plan_node(
    node: Any, total_bytes: int | None = None, *, num_gpus: float = 0.0
) -> MemoryPlan | None:
    """As `plan_engine`, for who builds an application: None where nothing can be known, and vLLM
    checks it when the engine starts. That is no more than told in the log for a model that is no
    local folder and for a GPU that this machine does not have, and warned of for the rest. Raises
    ConfigError for fewer GPUs than the engine has ranks."""
    _check_ranks(node.engine_options, num_gpus)
    if total_bytes is None and num_gpus and card_bytes() is None:
        _LOG.info("no memory plan of model %r: it runs on a GPU, and none is here", node.model)
        return None
    if not Path(node.model).is_dir():
        _LOG.info("no memory plan of model %r: it is no folder on this machine", node.model)
        return None
    try:
        return plan_engine(node, total_bytes, num_gpus=num_gpus)
    except ConfigError as error:
        _LOG.warning(
            "whether the engine of model %r fits is not known before vLLM checks it at its start: "
            "%s", node.model, error,
        )  # fmt: skip
        return None


def _check_ranks(options: Mapping[str, Any], num_gpus: float) -> None:
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    ranks = math.prod(_whole(options, size, 1) for size in sizes)
    if 0 < num_gpus < ranks and ranks > 1:
        raise ConfigError(
            f"an engine with {' × '.join(sizes)} = {ranks} runs on as many GPUs, and the replicas "
            f"of its node have num_gpus={num_gpus:g}: give them num_gpus={ranks}"
        )


def is_engine(node: object) -> bool:
    """Whether a node starts an engine; known without importing vLLM."""
    return all(hasattr(node, name) for name in ("model", "engine_options", "environment"))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / (1 << 20):.2f} MiB"
