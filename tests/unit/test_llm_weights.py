"""Sizes of models, read from their folders."""

import json
import struct
import sys
from pathlib import Path

import pytest
from model_folders import LLAMA_8B, llama, write_header

from twinpath.errors import ConfigError
from twinpath.nodes.llm_weights import read_shape


def test_an_8b_llama_has_the_published_number_of_weights_and_kv_bytes(tmp_path):
    shape = read_shape(llama(tmp_path))
    assert shape.weight_bytes() == 2 * 8_030_261_248
    assert shape.kv_bytes_per_token() == 131_072
    assert shape.kv_bytes_per_token(kv_dtype="fp8") == 65_536


def test_ranks_share_matrices_and_heads_but_not_vectors(tmp_path):
    shape = read_shape(llama(tmp_path))
    vectors = 2 * 4096 * 65
    assert shape.weight_bytes(2) == (shape.weight_bytes() - vectors) // 2 + vectors
    assert shape.kv_bytes_per_token(8) == 131_072 // 8
    assert shape.kv_bytes_per_token(16) == 131_072 // 8, "a head is not divided, but repeated"


def test_float32_is_loaded_as_16_bits_unless_asked_for(tmp_path):
    folder = llama(tmp_path, stored="F32", torch_dtype="float32")
    assert read_shape(folder).weight_bytes() == 2 * 8_030_261_248
    assert read_shape(folder, "float32").weight_bytes() == 4 * 8_030_261_248
    assert read_shape(folder, "float32").kv_bytes_per_token() == 2 * 131_072


def test_tied_embeddings_are_held_once_and_quantized_weights_as_stored(tmp_path):
    tied = read_shape(llama(tmp_path / "tied", tie_word_embeddings=True))
    assert tied.weight_bytes() == 2 * (8_030_261_248 - 128256 * 4096)
    small = read_shape(llama(tmp_path / "fp8", stored="F8_E4M3"))
    assert small.weight_bytes() == 8_030_261_248


def test_latent_attention_caches_one_small_vector_a_layer(tmp_path):
    folder = llama(tmp_path, kv_lora_rank=512, qk_rope_head_dim=64)
    assert read_shape(folder).kv_bytes_per_token(4) == 32 * 576 * 2


# --- which files ---------------------------------------------------------------------------


def index(folder: Path, name: str = "model.safetensors.index.json", *files: str) -> None:
    names = {f"tensor.{i}": file for i, file in enumerate(files)}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_what_lies_beside_the_files_of_the_index_is_not_counted(tmp_path):
    folder = llama(tmp_path)
    whole = read_shape(folder).weight_bytes()
    write_header(folder / "stray.safetensors", {"model.x.weight": ("BF16", (1 << 20, 1 << 10))})
    assert read_shape(folder).weight_bytes() > whole, "without an index vLLM loads all there are"
    index(folder, "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors")
    assert read_shape(folder).weight_bytes() == whole
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"index\.json names model-2\.safetensors, not in"):
        read_shape(folder)


def test_consolidated_weights_are_loaded_instead_of_the_shards_not_with_them(tmp_path):
    folder = llama(tmp_path)
    index(folder, "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors")
    write_header(folder / "consolidated.safetensors", {"layers.0.wq": ("BF16", (4096, 4096))})
    assert read_shape(folder).weight_bytes() == 2 * 4096 * 4096


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_the_size_of_other_files_is_taken_for_their_weights(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    with pytest.raises(ConfigError, match=r"no weights in \.safetensors, \.bin or \.pt files"):
        read_shape(tmp_path)
    for file in (name, "training_args.bin", "optimizer.pt"):
        with (tmp_path / file).open("wb") as opened:
            opened.truncate(16 << 20)  # a hole, which takes no room
    assert read_shape(tmp_path).weight_bytes(2) == 8 << 20
    assert read_shape(tmp_path, "float32").weight_bytes() == 32 << 20
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"torch_dtype": "float32"}))
    assert read_shape(tmp_path).weight_bytes() == 8 << 20, "loaded in 16 bits"
    write_header(tmp_path / "model.safetensors", {"a": ("BF16", (4, 4))})
    assert read_shape(tmp_path).weight_bytes() == 32, "safetensors come first"


def test_types_of_elements_that_nobody_heard_of_are_as_large_as_the_file_says(tmp_path):
    folder = llama(tmp_path)
    before = read_shape(folder).weight_bytes()
    exotic = {"a": ("F4", (8, 32)), "b": ("F6_E2M3", (4, 32)), "c": ("F8_E8M0", (3, 3))}
    write_header(folder / "model-3.safetensors", exotic)
    assert read_shape(folder).weight_bytes() == before + 128 + 96 + 9


def test_a_file_that_cannot_be_read_is_named_and_so_is_the_tensor(tmp_path):
    folder = llama(tmp_path)
    file = folder / "model-3.safetensors"
    for content in (b"version https://git-lfs.github.com/spec/v1", b"\x01", b"\x02" + bytes(7)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"model-3\.safetensors is no whole safetensors"):
            read_shape(folder)
    text = json.dumps({"model.x": {"dtype": "F4", "shape": [2]}}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ConfigError, match=r"tensor 'model\.x' of .*model-3.*data_offsets, got"):
        read_shape(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        read_shape(folder)


def test_pipeline_stages_divide_layers_and_cache_but_not_the_ends(tmp_path):
    shape = read_shape(llama(tmp_path))
    end = 2 * 128256 * 4096
    layers = shape.weight_bytes() - 2 * end - 2 * 4096
    # The first stage has the embeddings, the last as much: the head.
    assert shape.weight_bytes(stages=2) == layers // 2 + end + 2 * 4096
    assert shape.weight_bytes(stages=3) == layers * 11 // 32 + end + 2 * 4096
    assert shape.kv_bytes_per_token(stages=2) == 131_072 // 2
    assert shape.kv_bytes_per_token(stages=3) == 131_072 * 11 // 32
    assert shape.kv_bytes_per_token(2, 2) == 131_072 // 4


# --- configs -------------------------------------------------------------------------------

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 12, "n_layer": 12,
    "n_embd": 768, "n_ctx": 1024, "n_positions": 1024, "vocab_size": 50257,
}  # fmt: skip
INNER = {"num_attention_heads": 8, "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 100}


def folder_of(folder: Path, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"lm_head.weight": ("BF16", (50257, 768)), "h.0.w.weight": ("BF16", (4, 4))}
    write_header(folder / "model.safetensors", tensors)
    return folder


def test_names_of_older_models_are_read_with_and_without_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    shape = read_shape(folder_of(tmp_path, GPT2))
    sizes = (shape.layers, shape.kv_heads, shape.head_dim, shape.vocabulary, shape.max_positions)
    assert sizes == (12, 12, 64, 50257, 1024)
    assert shape.kv_bytes_per_token() == 2 * 12 * 768 * 2, "a model that writes has a cache"
    assert shape.weight_bytes() == 32, "GPT-2 ties its embeddings, and its config does not say so"
    monkeypatch.setitem(sys.modules, "transformers", None)
    plain = read_shape(tmp_path)
    assert (plain.layers, plain.kv_heads, plain.head_dim, plain.max_positions) == (12, 12, 64, 1024)
    assert plain.kv_bytes_per_token() == shape.kv_bytes_per_token()


def test_what_a_config_leaves_out_is_the_default_of_its_model(tmp_path):
    pytest.importorskip("transformers")
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    shape = read_shape(folder_of(tmp_path, {"model_type": "gemma3", "text_config": text}))
    assert (shape.kv_heads, shape.head_dim, shape.vocabulary) == (4, 256, 262208)


@pytest.mark.parametrize(
    "nested",
    [
        {"llm_config": INNER},
        {"language_config": INNER},
        {"text_config": INNER},
        {"thinker_config": {"text_config": INNER}},
        {"hidden_size": 7, "model_type": "nobody_knows", "llm_config": INNER},
    ],
)
def test_the_part_of_a_model_that_writes_text_is_found(tmp_path, nested):
    shape = read_shape(folder_of(tmp_path, nested))
    assert (shape.layers, shape.kv_heads, shape.hidden, shape.vocabulary) == (4, 8, 64, 100)


def test_keys_that_all_heads_share_are_cached_once(tmp_path):
    falcon = INNER | {"multi_query": True}
    assert read_shape(folder_of(tmp_path, falcon)).kv_heads == 1
    assert read_shape(folder_of(tmp_path, INNER | {"num_kv_heads": 2})).kv_heads == 2


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "configuration.py").write_text(f"open({str(ran)!r}, 'w')")
    own = {"model_type": "its_own", "auto_map": {"AutoConfig": "configuration.Config"}}
    assert read_shape(folder_of(tmp_path, INNER | own)).layers == 4
    assert not ran.exists()


def test_encoders_have_no_cache_and_all_others_do(tmp_path):
    def caches(**config) -> bool:
        return read_shape(folder_of(tmp_path, INNER | config)).caches

    for name in ("BertModel", "XLMRobertaForSequenceClassification", "GteNewModel"):
        assert not caches(architectures=[name])
    for name in ("Qwen3Model", "InternVLChatModel", "LlamaForSequenceClassification"):
        assert caches(architectures=[name])
    assert not caches(architectures=["Qwen2Model"], is_causal=False)


def test_a_config_without_a_transformer_says_what_is_missing_and_what_to_do(tmp_path):
    rest = {key: value for key, value in INNER.items() if key != "num_attention_heads"}
    with pytest.raises(ConfigError, match=r"has no 'num_attention_heads': expected .* Start the"):
        read_shape(folder_of(tmp_path, rest))
    with pytest.raises(ConfigError, match=r"has no 'vocab_size'"):
        read_shape(folder_of(tmp_path, INNER | {"vocab_size": "large"}))
    with pytest.raises(ConfigError, match="dtype 'float8': expected one of auto, float32"):
        read_shape(folder_of(tmp_path, INNER), "float8")


@pytest.mark.parametrize(
    ("kv_dtype", "head_bytes"),
    [
        ("auto", 512), ("bfloat16", 512), ("fp8_e5m2", 256), ("int8_per_token_head", 264),
        ("fp8_per_token_head", 264), ("int4_per_token_head", 136), ("nvfp4", 144),
        ("ultraquant_4bit", 136),
    ],
)  # fmt: skip
def test_caches_are_as_large_as_their_type_makes_them(tmp_path, kv_dtype, head_bytes):
    """Key and value of one head, of 128 numbers each, with their scales, as vLLM packs them."""
    shape = read_shape(llama(tmp_path))
    assert shape.kv_bytes_per_token(kv_dtype=kv_dtype) == 32 * 8 * head_bytes


def test_packed_caches_of_latent_attention_have_a_size_of_their_own(tmp_path):
    latent = read_shape(llama(tmp_path / "mla", kv_lora_rank=512, qk_rope_head_dim=64))
    assert latent.kv_bytes_per_token(kv_dtype="fp8_ds_mla") == 32 * 656
    assert latent.kv_bytes_per_token(kv_dtype="fp8") == 32 * 576
    with pytest.raises(ConfigError, match="kv_cache_dtype 'fp8_ds_mla': its size is not known"):
        read_shape(llama(tmp_path / "llama")).kv_bytes_per_token(kv_dtype="fp8_ds_mla")
