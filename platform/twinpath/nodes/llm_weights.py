"""What decides the memory that a model takes, read from its folder; nothing is loaded.

The files are those that vLLM would load (its ``DefaultModelLoader``): Mistral's consolidated ones,
else the safetensors that the index names, else ``.bin``, else ``.pt``. The header of safetensors
has each tensor's shape and bytes (https://github.com/huggingface/safetensors, "Format"); of the
others the size of the file is taken. ``config.json`` is read by transformers, which knows each
model's own names and defaults, and as plain JSON where that is not installed or does not know the
model. Code that comes with a model is never run.
"""

import json
import logging
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from twinpath.errors import ConfigError

_LOG = logging.getLogger(__name__)
#: A config's values by the names of transformers, and what some models call the same.
_NAMES = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "vocab_size": ("padded_vocab_size",),
    "num_key_value_heads": (
        "n_head_kv", "num_kv_heads", "multi_query_group_num", "num_attention_groups",
    ),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "head_dim": ("hidden_size_per_head",),
    "max_position_embeddings": ("n_positions", "n_ctx", "seq_length", "max_seq_len"),
    "kv_lora_rank": (),
    "qk_rope_head_dim": (),
}  # fmt: skip
#: Without these there is no plan.
_NEEDED = tuple(_NAMES)[:4]
#: Where models with several parts keep the config of the one that writes text.
_PARTS = ("thinker_config", "llm_config", "language_config", "text_config")
#: Models that read a text once and keep no cache, by their architecture's name.
_ENCODERS = re.compile(r"bert|electra|mpnet|gte\w*model|newmodel|clip|encodermodel", re.I)
#: Patterns of files, each with the index that says which of them belong together.
_FILES = (
    ("consolidated*.safetensors", "consolidated.safetensors.index.json"),
    ("*.safetensors", "model.safetensors.index.json"),
    ("*.bin", None),
    ("*.pt", None),
)
#: A trainer's, not a model's.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_DTYPES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
#: Tensors that are loaded in the engine's type; all others as they are stored.
_FLOATS = ("F64", "F32", "F16", "BF16")
#: vLLM's ``kv_cache_dtype``: bits of an element, and bytes of scales for each head of a token.
_KV_DTYPES: dict[str, tuple[float, int]] = {
    "float16": (16, 0), "bfloat16": (16, 0), "fp8": (8, 0), "fp8_e4m3": (8, 0),
    "fp8_e5m2": (8, 0), "fp8_inc": (8, 0), "fp8_per_token_head": (8, 8),
    "int8_per_token_head": (8, 8), "int4_per_token_head": (4, 8), "nvfp4": (4.5, 0),
    "nvfp4_4over6": (4.5, 0), "ultraquant_4bit": (4.25, 0),
}  # fmt: skip
#: Those of latent attention only: bytes for a token and layer, whatever the model's sizes.
_LATENT_DTYPES = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}


class Weight(NamedTuple):
    """Bytes of a tensor as it is loaded, and which ranks have it."""

    size: int
    #: Tensor-parallel ranks divide matrices; each has all of a vector.
    matrix: bool
    #: Pipeline stages divide the layers; the first has the embeddings, the last the head.
    place: Literal["layer", "first", "last"] = "layer"


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the memory that it takes."""

    weights: tuple[Weight, ...]
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
    #: Whether the weights are stored as they are computed with, in fewer bits.
    quantized: bool = False

    def weight_bytes(self, ranks: int = 1, stages: int = 1) -> int:
        """Bytes of the weights on one tensor-parallel rank, of the largest pipeline stage."""
        sums = {"layer": 0, "first": 0, "last": 0}
        for size, matrix, place in self.weights:
            sums[place] += -(-size // ranks) if matrix else size
        if stages == 1:
            return sum(sums.values())
        layers = sums["layer"] * self._stage_layers(stages) // self.layers
        return layers + max(sums["first"], sums["last"])

    def kv_bytes_per_token(self, ranks: int = 1, stages: int = 1, kv_dtype: str = "auto") -> int:
        """Bytes of the KV cache for one token on one rank. Raises ConfigError for a type of which
        the size is not known."""
        if not self.caches:
            return 0
        layers = self._stage_layers(stages)
        if self.latent and kv_dtype in _LATENT_DTYPES:
            return layers * _LATENT_DTYPES[kv_dtype]
        known = {"auto": (8 * self.dtype_bytes, 0), **_KV_DTYPES}
        if kv_dtype not in known:
            names = [*known, *(_LATENT_DTYPES if self.latent else ())]
            raise ConfigError(
                f"kv_cache_dtype {kv_dtype!r}: its size is not known here; expected one of "
                f"{', '.join(names)}. Plan with the next larger of these, or start the engine"
            )
        bits, scales = known[kv_dtype]
        if self.latent:  # every rank keeps the latent vector
            return layers * math.ceil(self.latent * bits / 8 + scales)
        heads = max(1, -(-self.kv_heads // ranks))
        return layers * heads * math.ceil(2 * self.head_dim * bits / 8 + scales)

    def working_bytes(self, ranks: int, sequences: int, batched_tokens: int) -> int:
        """An estimate: residual, attention and MLP activations of the widest layer for a batch of
        tokens, and the logits of each sequence in float32, twice (sampling copies them)."""
        width = 4 * self.hidden + 2 * -(-self.intermediate // ranks)
        return batched_tokens * width * self.dtype_bytes + 2 * 4 * sequences * self.vocabulary

    def _stage_layers(self, stages: int) -> int:
        return -(-self.layers // stages)


def read_shape(model: str | Path, dtype: str = "auto") -> ModelShape:
    """The shape of a model in a local folder; ``dtype`` is vLLM's engine argument. Raises
    ConfigError for a folder that does not say it, with what is missing."""
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(f"model {str(model)!r} is no local folder: download the model first")
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(f"model {str(model)!r} has no config.json: a plan reads its sizes there")
    raw = _read_json(file)
    plain = _flat(raw)
    values = _values(folder, raw, plain)
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        asked = find_spec("transformers") is not None
        raise ConfigError(
            f"{file} has no {', '.join(map(repr, missing))}: expected the config of a transformer, "
            f"{'or one that transformers knows' if asked else 'and transformers, which knows more'}"
            f"{'' if asked else ', is not installed'}. Start the engine to see: vLLM checks it"
        )
    size = _element_bytes(dtype)
    tied = bool(values.get("tie_word_embeddings"))
    stored = str(plain.get("dtype") or plain.get("torch_dtype") or "float32").removeprefix("torch.")
    weights = tuple(_weights(weight_files(folder), size, _DTYPES.get(stored, size), tied))
    if not weights:
        raise ConfigError(
            f"model {str(model)!r} has no weights in .safetensors, .bin or .pt files to read the "
            "sizes from: download them first"
        )
    heads, rank = values["num_attention_heads"], values.get("kv_lora_rank", 0)
    hidden = values["hidden_size"]
    return ModelShape(
        weights=weights,
        layers=values["num_hidden_layers"],
        kv_heads=_kv_heads(values, plain),
        head_dim=values.get("head_dim", hidden // heads),
        hidden=hidden,
        intermediate=values.get("intermediate_size", 4 * hidden),
        vocabulary=values["vocab_size"],
        max_positions=values.get("max_position_embeddings", 2048),
        dtype_bytes=size,
        latent=rank + values.get("qk_rope_head_dim", 0) if rank else 0,
        caches=_caches(raw, plain),
        quantized=bool(plain.get("quantization_config") or plain.get("compression_config"))
        or (folder / "hf_quant_config.json").exists(),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that vLLM loads of a local folder. Raises ConfigError where its index names one
    that is not there."""
    for pattern, index in _FILES:
        files = [file for file in sorted(folder.glob(pattern)) if file.name not in _NO_WEIGHTS]
        if files and index and (folder / index).exists():
            wanted = set(_read_json(folder / index).get("weight_map", {}).values())
            if absent := sorted(wanted - {file.name for file in files}):
                raise ConfigError(
                    f"{folder / index} names {', '.join(absent)}, not in the folder: download "
                    "the model again"
                )
            files = [file for file in files if file.name in wanted]
        if files:
            return files
    return []


def read_header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file: name → dtype, shape, offsets. Reads the header only. Raises
    ConfigError for a file that has none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"a header of {length} bytes is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(
            f"{path} is no whole safetensors file ({error}). A pointer of Git LFS, or a download "
            "that broke off? Download it again"
        ) from None
    header.pop("__metadata__", None)
    return header


def _weights(files: Iterable[Path], size: int, stored: int, tied: bool) -> Iterator[Weight]:
    """Each tensor; of a file that is not safetensors the whole as one, its elements of ``stored``
    bytes loaded in ``size``."""
    for file in files:
        if file.suffix != ".safetensors":
            yield Weight(file.stat().st_size * size // stored, matrix=True)
            continue
        for name, entry in read_header(file).items():
            if tied and name.endswith("lm_head.weight"):
                continue
            try:
                shape, (begin, end) = entry["shape"], entry["data_offsets"]
                loaded = math.prod(shape) * size if entry["dtype"] in _FLOATS else end - begin
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"tensor {name!r} of {file}: expected dtype, shape and data_offsets, got "
                    f"{entry!r} ({error!r}). Download the file again"
                ) from None
            yield Weight(loaded, matrix=len(shape) > 1, place=_place(name))


def _place(name: str) -> Literal["layer", "first", "last"]:
    if "lm_head" in name or "embed_out" in name or name == "output.weight":
        return "last"
    tower = any(part in name for part in ("vision", "visual", "audio"))
    return "layer" if re.search(r"(?:^|\.)\d+\.", name) and not tower else "first"


def _element_bytes(dtype: str) -> int:
    """vLLM's ``auto`` is a type of 16 bits, also where the weights are stored in float32."""
    name = dtype.removeprefix("torch.")
    if name == "auto":
        return 2
    if name not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, got a {type(found).__name__}")
    return found


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what its part for text says, and with that over its own."""
    merged, level = dict(raw), raw
    while part := next((level[n] for n in _PARTS if isinstance(level.get(n), dict)), None):
        merged, level = merged | part, part
    return merged


def _values(folder: Path, raw: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of `_NAMES`, and whether the embeddings are tied to the head."""
    library = _by_transformers(folder) if "model_type" in raw else None
    found = {}
    for name, others in _NAMES.items():
        given = [plain.get(each) for each in (name, *others)]
        known = [getattr(library, each, None) for each in (name, *others)]
        # Some versions of transformers read this one as another: vLLM takes the file's, too.
        order = given + known if name == "qk_rope_head_dim" else known + given
        numbers = [n for n in order if type(n) is int and n > 0]
        if numbers:
            found[name] = numbers[0]
    tied = plain.get("tie_word_embeddings")
    found["tie_word_embeddings"] = (
        getattr(library, "tie_word_embeddings", False) if tied is None else tied
    )
    return found


def _by_transformers(folder: Path) -> Any:
    """The config of the model's text part by transformers; None where that has none."""
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.get_text_config()
    except Exception as error:  # not installed, or any of what it makes of a config
        _LOG.debug("transformers does not read the config of %s: %s", folder, error)
        return None


def _kv_heads(values: Mapping[str, Any], plain: Mapping[str, Any]) -> int:
    if plain.get("multi_query") and not plain.get("new_decoder_architecture"):
        return 1  # Falcon, StarCoder
    return int(values.get("num_key_value_heads", values["num_attention_heads"]))


def _caches(raw: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether the model keeps a KV cache. One that is not known to keep none is counted with it."""
    names = " ".join(raw.get("architectures") or ()) or str(raw.get("model_type", ""))
    writes = any(word in names for word in ("Causal", "ConditionalGeneration"))
    return writes or not (plain.get("is_causal") is False or _ENCODERS.search(names))
