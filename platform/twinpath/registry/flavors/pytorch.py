"""PyTorch: a state dict in safetensors for a class that the node names; exported programs and
pickled modules of a trusted source.

MLflow has no flavor for bare weights, so ``save_weights`` writes one of ours: MLmodel with
``twinpath_torch: {data: weights.safetensors}``.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from twinpath.errors import ConfigError, MissingExtraError, ModelLoadError
from twinpath.graph.columns import Columns
from twinpath.registry.device import TorchRunner, torch_module
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import UNNAMED, matrix

WEIGHTS = "weights.safetensors"


class TorchModel:
    """A module of one tensor."""

    def __init__(self, module: Any, options: LoadOptions, exported: bool = False) -> None:
        self._runner = TorchRunner(module, options.torch, exported)
        size = self._runner.weights_bytes
        on_gpu = self._runner.device.type == "cuda"
        self.host_bytes, self.vram_bytes = (0, size) if on_gpu else (size, 0)

    def predict(self, inputs: Columns) -> Any:
        """See `Model`. Columns that are no tensor yet become a float32 matrix."""
        values = inputs.get(UNNAMED)
        if values is None:
            values = matrix(inputs, tuple(inputs), np.float32)
        return self._runner.run(values)


def load(manifest: Manifest, options: LoadOptions) -> TorchModel:
    """The module of a version. Raises MissingExtraError, ModelLoadError, ConfigError."""
    if "twinpath_torch" in manifest.flavors:
        name = str(manifest.flavors["twinpath_torch"].get("data", WEIGHTS))
        return TorchModel(_with_weights(manifest.file(name), options), options)
    torch = torch_module()
    folder = manifest.file(str(manifest.flavors["pytorch"].get("model_data", "data")))
    exported = folder / "model.pt2"
    if exported.is_file():
        return TorchModel(torch.export.load(exported).module(), options, exported=True)
    pickled = folder / "model.pth"
    if not pickled.is_file():
        raise ModelLoadError("the version has neither model.pt2 nor model.pth")
    return TorchModel(torch.load(pickled, map_location="cpu", weights_only=False), options)


def save_weights(module: Any, path: Path, signature: Any = None, input_example: Any = None) -> None:
    """Write a module's state dict as a version's files below ``path``, to be registered with
    ``mlflow.register_model(path)``. ``signature`` is MLflow's. Shapes of ``input_example``: (n, …).
    """
    from mlflow.models import Model

    safetensors = _safetensors()
    path.mkdir(parents=True)
    weights = {n: t.detach().cpu().contiguous() for n, t in module.state_dict().items()}
    safetensors.save_file(weights, path / WEIGHTS)
    model = Model(signature=signature)
    if input_example is not None:
        np.save(path / "example.npy", np.asarray(input_example), allow_pickle=False)
    model.add_flavor("twinpath_torch", data=WEIGHTS)
    model.save(str(path / "MLmodel"))


def _with_weights(path: Path, options: LoadOptions) -> Any:
    if options.architecture is None:
        raise ConfigError(
            f"{path.name} holds weights alone: name the class that they are for, "
            "architecture='package.module:Class', in the node"
        )
    module_name, _, name = options.architecture.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"architecture {options.architecture!r}: {error}") from None
    module = make()
    try:
        module.load_state_dict(_safetensors().load_file(path))
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ModelLoadError(f"the weights do not fit {options.architecture}: {text}") from None
    return module


def _safetensors() -> Any:
    torch_module()
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError("safetensors", "flavors") from None
    return safetensors.torch
