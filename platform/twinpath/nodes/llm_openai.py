"""vLLM's own OpenAI server around an engine of ours, without its launcher.

``build_app`` and ``init_app_state`` are what ``vllm serve`` makes its app of, so that every
endpoint behaves as there. They are of the vLLM version that this project is pinned to.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from twinpath.errors import ConfigError, did_you_mean
from twinpath.nodes.llm_engine import refusals
from twinpath.nodes.llm_frontend import start_at_once

#: Options of vLLM's server that have their place elsewhere here: Serve's, and the gateway's.
_NOT_OURS = ("api_key", "host", "port", "root_path", "middleware", "allowed_origins", "uds")


async def openai_app(
    engine: Any, arguments: Any, options: Mapping[str, Any], loras: Mapping[str, str]
) -> Any:
    """The ASGI app. ``arguments`` are the engine's AsyncEngineArgs, ``options`` fields of vLLM's
    FrontendArgs. Raises ConfigError."""
    from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    start_at_once()
    namespace = server_namespace(arguments, options, loras)
    tasks = await engine.get_supported_tasks()
    app = build_app(namespace, tasks, engine.model_config)
    # It counts requests for a page that is not reached here.
    counting = PrometheusInstrumentatorMiddleware
    app.user_middleware = [each for each in app.user_middleware if each.cls is not counting]
    app.middleware_stack = None  # vLLM has made it already
    await init_app_state(engine, app.state, namespace, tasks)
    # Where the engine is dead vLLM's handlers tell the server to end; ours is ended by its replica.
    app.state.server = SimpleNamespace()
    return app


def server_namespace(
    arguments: Any, options: Mapping[str, Any], loras: Mapping[str, str]
) -> Namespace:
    """What ``vllm serve`` would have parsed of its command line. Raises ConfigError."""
    from vllm.entrypoints.launchers.cli_args import (
        FrontendArgs,
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {field.name for field in dataclasses.fields(FrontendArgs)} - {*_NOT_OURS}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"openai option {name!r} is none of the options of vLLM's server that are used "
                f"here.{did_you_mean(name, known)}"
            )
    namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for field in dataclasses.fields(arguments):
        setattr(namespace, field.name, getattr(arguments, field.name))
    # On the command line it is a list.
    if isinstance(namespace.served_model_name, str):
        namespace.served_model_name = [namespace.served_model_name]
    for name, value in options.items():
        setattr(namespace, name, value)
    if loras:
        namespace.lora_modules = [LoRAModulePath(name, path) for name, path in loras.items()]
    try:
        validate_parsed_serve_args(namespace)
    except refusals() as error:
        raise ConfigError(f"openai options: {error}") from None
    return namespace
