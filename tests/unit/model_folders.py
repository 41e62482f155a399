"""Folders of models without their numbers, for what plans their memory."""

import json
import math
import struct
from pathlib import Path

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
#: Bits of an element, of those that the tests store.
BITS = {"BF16": 16, "F32": 32, "I32": 32, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F4": 4}


def write_header(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file without its data: the plan never reads further than the header."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def llama(folder: Path, stored: str = "BF16", **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = LLAMA_8B | changes
    (folder / "config.json").write_text(json.dumps(config))
    width, inner, words = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width),
        "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }  # fmt: skip
    tensors = {
        f"model.layers.{i}.{name}.weight": (stored, shape)
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    write_header(folder / "model-1.safetensors", tensors)
    ends = {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    ends["model.embed_tokens.weight"] = (words, width)
    write_header(folder / "model-2.safetensors", {n: (stored, s) for n, s in ends.items()})
    return folder
