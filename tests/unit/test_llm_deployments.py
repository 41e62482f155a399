"""The serve configs of language models are what the graph's arguments and vLLM's allow."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from twinpath.online.args import args_model, place
from twinpath.online.handles import routes_rows
from twinpath.online.protocols.openai import engine_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["llm", "llm-gpu"])
def application(request: pytest.FixtureRequest) -> dict[str, Any]:
    pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "deployments" / f"{request.param}.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    return application


def test_a_config_fits_its_graph(application: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    variables = application["runtime_env"]["env_vars"]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = importlib.reload(importlib.import_module("graphs.chat"))
    args = args_model(module.graph.plan).model_validate(application["args"])
    plan = place(module.graph.plan, args)
    node = plan.steps[0].node
    assert node.engine_options == json.loads(variables["TWINPATH_CHAT_ENGINE"])
    gpus = node.engine_options.get("tensor_parallel_size", 0)
    assert plan.steps[0].placement.num_gpus == gpus
    assert engine_step(plan) is not None, "the OpenAI API is served"
    assert routes_rows(plan.steps[0]), "and prompts that begin alike go to the same replica"
