"""Does a model fit on a card? Plain arithmetic on its files; nothing is loaded, no engine started.

For each tensor-parallel rank:

* **weights**: the shapes in the safetensors headers (https://github.com/huggingface/safetensors,
  "Format"), matrices divided by the ranks, vectors whole, as Megatron-LM does (Shoeybi et al.
  2019, arXiv:1909.08053);
* **KV cache**: 2 · layers · kv_heads · head_dim · bytes for each token (Kwon et al. 2023,
  arXiv:2309.06180; grouped heads: Ainslie et al. 2023, arXiv:2305.13245), or layers ·
  (kv_lora_rank + qk_rope_head_dim) · bytes with latent attention (DeepSeek-V2, arXiv:2405.04434);
* **working memory**: an estimate of the largest activations and of the logits that are sampled.

Sliding windows and hybrid layers need less than this: it is an upper bound for them.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinpath.errors import ConfigError, MemoryPlanError

#: Part of the memory that is left free unless said otherwise: fragments, graphs, other processes.
HEADROOM = 0.125
#: Less is refused.
LEAST_HEADROOM = 0.1
GIB = 1 << 30
#: What vLLM takes where its engine arguments do not say (their defaults in 0.32).
MAX_NUM_SEQS, MAX_BATCHED_TOKENS = 256, 2048
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1,
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_KV_DTYPES = _DTYPES | {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the memory that it takes."""

    #: Shape and bytes of an element for each tensor, as it is loaded.
    tensors: tuple[tuple[tuple[int, ...], int], ...]
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    max_positions: int
    dtype_bytes: int
    #: Numbers cached for a token and layer with latent attention; 0 without.
    latent: int = 0
    #: False for encoders, which keep nothing between steps.
    caches: bool = True

    def weight_bytes(self, ranks: int = 1) -> int:
        """Bytes of the weights on one rank."""
        return sum(
            size * -(-math.prod(shape) // (ranks if len(shape) > 1 else 1))
            for shape, size in self.tensors
        )

    def kv_bytes_per_token(self, ranks: int = 1, kv_bytes: int | None = None) -> int:
        """Bytes of the KV cache for one token on one rank; ``kv_bytes`` is an element's size."""
        if not self.caches:
            return 0
        size = self.dtype_bytes if kv_bytes is None else kv_bytes
        if self.latent:  # every rank keeps the latent vector
            return self.layers * self.latent * size
        heads = max(1, -(-self.kv_heads // ranks))
        return 2 * self.layers * heads * self.head_dim * size

    def working_bytes(self, ranks: int, sequences: int, batched_tokens: int) -> int:
        """An estimate: residual, attention and MLP activations of the widest layer for a batch of
        tokens, and the logits of each sequence in float32, twice (sampling copies them)."""
        width = 4 * self.hidden + 2 * -(-self.intermediate // ranks)
        return batched_tokens * width * self.dtype_bytes + 2 * 4 * sequences * self.vocabulary


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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = (
            "model", "total_bytes", "headroom", "usable_bytes", "versions", "ranks",
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


def read_shape(model: str | Path, dtype: str = "auto") -> ModelShape:
    """The shape of a model in a local folder, from ``config.json`` and the safetensors headers.

    ``dtype`` is vLLM's engine argument. Raises ConfigError for a folder without them.
    """
    folder = Path(model)
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(f"model {str(model)!r} is no local folder with a config.json")
    config = json.loads(file.read_text())
    config = config | config.get("text_config", {})
    headers = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    if not headers:
        raise ConfigError(f"model {str(model)!r} has no .safetensors files to read the sizes from")
    size = _element_bytes(dtype, config, headers)
    tied = config.get("tie_word_embeddings", False)
    tensors = [
        (tuple(entry["shape"]), size if entry["dtype"] in _FLOATS else _BYTES[entry["dtype"]])
        for header in headers
        for name, entry in header.items()
        if not (tied and name.endswith("lm_head.weight"))
    ]
    try:
        return _shape(config, tensors, size)
    except KeyError as error:
        raise ConfigError(f"{file} has no {error}: it describes no transformer") from None


def read_header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file: name → dtype, shape, offsets. Reads the header only."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def plan_memory(
    model: str | Path,
    total_bytes: int,
    *,
    engine: Mapping[str, Any] | None = None,
    versions: int = 1,
    sequences: int = 1,
    headroom: float = HEADROOM,
    kv_space_bytes: int | None = None,
) -> MemoryPlan:
    """The plan of ``versions`` engines of a model on a card of ``total_bytes``.

    ``engine`` are vLLM's engine arguments (``tensor_parallel_size``, ``max_model_len``, …). The KV
    cache is counted for ``sequences`` of ``max_model_len`` tokens at a time, or as
    ``kv_space_bytes`` (``kv_cache_memory_bytes``, VLLM_CPU_KVCACHE_SPACE) where that is set.
    Raises ConfigError for values that make no sense.
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
    shape = read_shape(model, str(options.get("dtype", "auto")))
    ranks = int(options.get("tensor_parallel_size") or 1)
    kv_dtype = str(options.get("kv_cache_dtype") or "auto")
    if kv_dtype != "auto" and kv_dtype not in _KV_DTYPES:
        raise ConfigError(f"kv_cache_dtype {kv_dtype!r}: known are auto, {', '.join(_KV_DTYPES)}")
    per_token = shape.kv_bytes_per_token(ranks, _KV_DTYPES.get(kv_dtype))
    length = int(options.get("max_model_len") or shape.max_positions)
    batched = int(options.get("max_num_batched_tokens") or max(MAX_BATCHED_TOKENS, length))
    at_once = int(options.get("max_num_seqs") or MAX_NUM_SEQS)
    space = options.get("kv_cache_memory_bytes") or kv_space_bytes
    # Of no account on a CPU where the cache has a size.
    told = None if kv_space_bytes else options.get("gpu_memory_utilization")
    return MemoryPlan(
        model=str(model), total_bytes=int(total_bytes), headroom=headroom, versions=versions,
        ranks=ranks, weights_bytes=shape.weight_bytes(ranks),
        working_bytes=shape.working_bytes(ranks, at_once, batched),
        kv_bytes=max(int(space or 0), sequences * length * per_token),
        kv_bytes_per_token=per_token, sequences=sequences, tokens_per_sequence=length,
        share=None if told is None else float(told), sized=bool(space),
    )  # fmt: skip


def card_bytes() -> int | None:
    """Memory of the smallest GPU of this machine by NVML; None without one, or without NVML."""
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
    finally:
        pynvml.nvmlShutdown()


def host_bytes() -> int:
    """Memory of this machine, or what its control group allows, where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def plan_node(
    node: Any,
    total_bytes: int | None = None,
    *,
    versions: int = 1,
    sequences: int = 1,
    headroom: float = HEADROOM,
    num_gpus: float = 0.0,
) -> MemoryPlan | None:
    """The plan of an engine node; None where nothing can be known: its model is no local folder,
    or it runs on a GPU and this machine has none. With ``num_gpus`` below 1 it is one of as many
    engines as Ray puts on a card. Raises ConfigError for fewer GPUs than the engine has ranks."""
    options = dict(node.engine_options)
    if 0 < num_gpus < 1:
        versions = max(versions, math.floor(1 / num_gpus + 1e-9))
        options.setdefault("gpu_memory_utilization", 1 - HEADROOM)  # as its setup does
    _check_ranks(options, num_gpus)
    if total_bytes is None:
        total_bytes = card_bytes() if num_gpus else host_bytes()
    if total_bytes is None or not (Path(node.model) / "config.json").exists():
        return None
    # The node's own, else that of the application (``runtime_env``) or of the machine.
    space = None if num_gpus else (os.environ | node.environment).get("VLLM_CPU_KVCACHE_SPACE")
    return plan_memory(
        node.model, total_bytes, engine=options, versions=versions,
        sequences=sequences, headroom=headroom,
        kv_space_bytes=int(float(space) * GIB) if space else None,
    )  # fmt: skip


def _check_ranks(options: Mapping[str, Any], num_gpus: float) -> None:
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    ranks = math.prod(int(options.get(size) or 1) for size in sizes)
    if 0 < num_gpus < ranks and ranks > 1:
        raise ConfigError(
            f"an engine with {' × '.join(sizes)} = {ranks} runs on as many GPUs, and the replicas "
            f"of its node have num_gpus={num_gpus:g}: give them num_gpus={ranks}"
        )


def is_engine(node: object) -> bool:
    """Whether a node starts an engine; known without importing vLLM."""
    return all(hasattr(node, name) for name in ("model", "engine_options", "environment"))


def _shape(config: Mapping[str, Any], tensors: list[Any], size: int) -> ModelShape:
    heads = config["num_attention_heads"]
    hidden = config["hidden_size"]
    rank = config.get("kv_lora_rank") or 0
    architectures = " ".join(config.get("architectures") or ())
    return ModelShape(
        tensors=tuple(tensors),
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        hidden=hidden,
        intermediate=config.get("intermediate_size") or 4 * hidden,
        vocabulary=config["vocab_size"],
        max_positions=config.get("max_position_embeddings") or 2048,
        dtype_bytes=size,
        latent=rank + config.get("qk_rope_head_dim", 0) if rank else 0,
        caches="Causal" in architectures or "ConditionalGeneration" in architectures,
    )


def _element_bytes(dtype: str, config: Mapping[str, Any], headers: list[dict[str, Any]]) -> int:
    """vLLM's ``auto`` loads float32 as 16 bits, and anything else as it is stored."""
    if dtype == "auto":
        stored = {entry["dtype"] for header in headers for entry in header.values()}
        named = config.get("dtype") or config.get("torch_dtype")
        return 2 if named or stored & {*_FLOATS} else min(_BYTES[kind] for kind in stored)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: known are auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / (1 << 20):.2f} MiB"
