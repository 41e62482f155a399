"""Protocols: codecs that translate between the wire and columns, and nothing else."""

from starlette.routing import BaseRoute

from twinpath.online.dataplane import DataPlane
from twinpath.online.exchange import Codec
from twinpath.online.protocols import mlflow_scoring, oip_model, predict, tf_serving

#: Every protocol that a graph is served over, by HTTP.
PROTOCOLS = (predict, oip_model, tf_serving, mlflow_scoring)


def codecs(plane: DataPlane) -> dict[str, Codec]:
    """Codecs of all protocols by path below the app's root."""
    return {path: codec for each in PROTOCOLS for path, codec in each.inference(plane).items()}


def routes(plane: DataPlane) -> list[BaseRoute]:
    """Everything else that the protocols answer: metadata, readiness, models not here."""
    return [route for each in PROTOCOLS for route in each.routes(plane)]
