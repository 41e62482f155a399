"""Memory of models, counted from their files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from twinpath import Graph, Node
from twinpath.cli import app
from twinpath.errors import ConfigError, MemoryPlanError
from twinpath.nodes import llm_memory
from twinpath.nodes.llm_memory import GIB, plan_memory, plan_node, read_shape

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_size_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def write_header(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file without its data: the plan never reads further than the header."""
    entries = {n: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for n, (d, s) in tensors.items()}
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


def test_an_8b_llama_has_the_published_number_of_weights_and_kv_bytes(tmp_path):
    shape = read_shape(llama(tmp_path))
    assert shape.weight_bytes() == 2 * 8_030_261_248
    assert shape.kv_bytes_per_token() == 131_072
    assert shape.kv_bytes_per_token(kv_bytes=1) == 65_536


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


def test_an_encoder_keeps_no_cache(tmp_path):
    folder = llama(tmp_path, architectures=["BertModel"])
    assert plan_memory(folder, 80 * GIB).kv_bytes == 0


def test_a_model_fits_a_card_with_its_headroom_and_is_refused_with_the_numbers_otherwise(tmp_path):
    folder = llama(tmp_path)
    plan = plan_memory(folder, 24 * GIB, sequences=4)
    assert plan.kv_bytes == 4 * 8192 * 131_072
    assert plan.usable_bytes == 21 * GIB
    assert plan.check().fits
    assert plan.spare_tokens * 131_072 <= plan.usable_bytes - plan.needed_bytes + plan.kv_bytes
    with pytest.raises(
        MemoryPlanError,
        match=r"does not fit: weights 14\.96 GiB.*KV cache 16\.00 GiB for 16 × 8192 tokens.*"
        r"21\.00 GiB of 24\.00 GiB can be used with 12\.5% headroom",
    ):
        plan_memory(folder, 24 * GIB, sequences=16).check()
    with pytest.raises(MemoryPlanError, match=r"2 versions × \(weights 14\.96 GiB"):
        plan_memory(folder, 24 * GIB, versions=2).check()
    assert plan_memory(folder, 24 * GIB, versions=2, engine={"tensor_parallel_size": 2}).fits


@pytest.mark.parametrize("headroom", [0.10, 0.125, 0.15])
def test_versions_side_by_side_leave_the_headroom(tmp_path, headroom):
    plan = plan_memory(llama(tmp_path), 80 * GIB, versions=3, headroom=headroom)
    assert plan.versions * plan.utilization <= 1 - headroom
    assert plan.utilization > (1 - headroom) / 3 - 0.01


def test_what_makes_no_sense_is_refused_by_name(tmp_path):
    folder = llama(tmp_path / "model")
    with pytest.raises(ConfigError, match="versions: expected at least 1, got 0"):
        plan_memory(folder, GIB, versions=0)
    for headroom in (12.5, 0.0, 0.09):
        with pytest.raises(ConfigError, match=rf"headroom: .*0\.1 .* got {headroom}"):
            plan_memory(folder, GIB, headroom=headroom)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype 'int3': known are auto"):
        plan_memory(folder, GIB, engine={"kv_cache_dtype": "int3"})
    with pytest.raises(ConfigError, match=r"no local folder with a config\.json"):
        plan_memory(tmp_path / "nowhere", GIB)
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 3}')
    with pytest.raises(ConfigError, match="has no 'num_attention_heads'"):
        plan_memory(folder, GIB)


class Text(BaseModel):
    text: str


class Engine(Node):
    """Has what an engine node has, as far as a plan looks."""

    outputs = {"text": "str"}

    def __init__(self, model: str) -> None:
        self.model, self.engine_options = model, {"max_model_len": 4096}
        self.environment = {"VLLM_CPU_KVCACHE_SPACE": "2"}


def test_a_cache_of_fixed_size_is_what_a_node_takes_on_a_cpu(tmp_path):
    plan = plan_node(Engine(str(llama(tmp_path))), 64 * GIB)
    assert (plan.kv_bytes, plan.tokens_per_sequence) == (2 * GIB, 4096)
    assert plan_node(Engine("some/name"), 64 * GIB) is None, "not here: nothing can be known"


def test_a_cache_whose_size_the_application_sets_is_counted_too(tmp_path, monkeypatch):
    node = Engine(str(llama(tmp_path)))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert plan_node(node, 64 * GIB).kv_bytes == 2 * GIB, "the node's own comes first"
    node.environment = {}
    assert plan_node(node, 64 * GIB).kv_bytes == 4 * GIB
    assert plan_node(node, 64 * GIB, num_gpus=1).kv_bytes < GIB, "a GPU has no such setting"


def test_an_application_whose_engine_cannot_fit_is_refused_when_it_is_built(tmp_path, monkeypatch):
    pytest.importorskip("ray.serve")
    monkeypatch.setattr(llm_memory, "host_bytes", lambda: 8 * GIB)
    graph = Graph("too-large", input=Text, output=Text)
    with graph as row:
        graph.output(Engine(str(llama(tmp_path)))(row))
    with pytest.raises(MemoryPlanError, match=r"does not fit: weights 14\.96 GiB"):
        graph.app({})
    monkeypatch.setattr(llm_memory, "host_bytes", lambda: 64 * GIB)
    assert graph.app({}) is not None


def test_what_an_engine_is_told_to_take_of_a_card_leaves_the_headroom(tmp_path):
    folder = llama(tmp_path)

    def plan(share: float, **more: Any):
        return plan_memory(folder, 24 * GIB, engine={"gpu_memory_utilization": share}, **more)

    assert plan(0.87).check().share == 0.87
    with pytest.raises(
        MemoryPlanError,
        match=r"utilization=0\.92 gives each of 1 engines 22\.08 GiB of 24\.00 GiB, and 21\.00 GiB "
        r"can be used with 12\.5% headroom\. 0\.87 leaves that",
    ):
        plan(0.92).check()
    assert plan(0.90, headroom=0.10).fits
    with pytest.raises(
        MemoryPlanError, match=r"weights 14\.96 GiB.*gives each of 1 engines 12\.00 GiB"
    ):
        plan(0.5).check()
    with pytest.raises(MemoryPlanError, match=r"2 versions × .* can be used"):
        plan(0.87, versions=2).check()
    sized = {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": GIB}
    assert plan_memory(folder, 24 * GIB, engine=sized).fits, "the cache does not come out of it"
    with pytest.raises(MemoryPlanError, match=r"each of 1 engines 22\.08 GiB"):
        plan_memory(folder, 24 * GIB, engine=sized | {"gpu_memory_utilization": 0.92}).check()


def test_a_part_of_a_card_is_planned_with_those_that_share_it(tmp_path):
    node = Engine(str(llama(tmp_path)))
    half = plan_node(node, 80 * GIB, num_gpus=0.5)
    assert (half.versions, half.share) == (2, 0.875)
    with pytest.raises(MemoryPlanError, match=r"each of 2 engines 70\.00 GiB.* 0\.43 leaves that"):
        half.check()
    node.engine_options["gpu_memory_utilization"] = 0.43
    assert plan_node(node, 80 * GIB, num_gpus=0.5).check().versions == 2
    assert plan_node(node, 80 * GIB, num_gpus=1).versions == 1
    assert plan_node(node, 80 * GIB).share is None, "the cache has a size on the CPU"
    node.environment = {}
    assert plan_node(node, 80 * GIB).share == 0.43, "and where it has none this is it"


def test_an_engine_with_fewer_gpus_than_ranks_is_refused_when_it_is_built(tmp_path):
    pytest.importorskip("ray.serve")
    graph = Graph("ranks", input=Text, output=Text)
    with graph as row:
        graph.output(Engine(str(llama(tmp_path))).on(num_gpus=1)(row))
    step = graph.plan.steps[0]
    step.node.engine_options |= {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"= 4 runs on .*num_gpus=1: give them num_gpus=4"):
        graph.app({})


def test_the_command_prints_the_plan_and_ends_with_1_when_it_does_not_fit(tmp_path):
    folder = str(llama(tmp_path / "llama-8b"))
    good = CliRunner().invoke(app, ["plan-memory", folder, "--memory-gib", "24", "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["llama-8b"]["fits"] is True
    bad = CliRunner().invoke(app, ["plan-memory", folder, "--memory-gib", "16"])
    assert bad.exit_code == 1
    assert "does not fit" in bad.stderr
    assert "14.958" in bad.stdout


GRAPH = """
from pydantic import BaseModel
from twinpath import Graph
from twinpath.nodes.llm import LLM
class Ask(BaseModel):
    prompt: str
class Told(BaseModel):
    text: str
graph = Graph("asked", input=Ask, output=Told)
with graph as row:
    graph.output(LLM({folder!r}, engine={{"max_model_len": 2048}}, environment={{
        "VLLM_CPU_KVCACHE_SPACE": "3"}})(row))
"""


def test_the_command_plans_every_engine_of_a_graph(tmp_path, monkeypatch):
    folder = llama(tmp_path / "llama")
    (tmp_path / "asked_here.py").write_text(GRAPH.format(folder=str(folder)))
    (tmp_path / "asked_there.py").write_text(GRAPH.format(folder="hub/name"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["plan-memory", "asked_here:graph", "--memory-gib", "48", "--versions", "2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    [plan] = json.loads(done.stdout).values()
    assert (plan["kv_bytes"], plan["versions"], plan["fits"]) == (3 * GIB, 2, True)
    lost = CliRunner().invoke(app, ["plan-memory", "asked_there:graph", "--memory-gib", "48"])
    assert isinstance(lost.exception, ConfigError)
    assert "'hub/name' is no local folder" in str(lost.exception)
