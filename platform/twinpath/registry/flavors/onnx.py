"""ONNX, run by onnxruntime."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import MissingExtraError, ModelLoadError
from twinpath.graph.columns import Columns
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import UNNAMED, matrix

_DTYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_, "tensor(string)": np.object_,
}  # fmt: skip


class OnnxModel:
    """A session. A graph of one input gets the columns as a matrix, one of several each by name."""

    def __init__(self, session: Any, options: LoadOptions, size_bytes: int, on_gpu: bool) -> None:
        self._session = session
        self.host_bytes = 0 if on_gpu else size_bytes
        self.vram_bytes = size_bytes if on_gpu else 0
        self._inputs = [(each.name, _DTYPES.get(each.type)) for each in session.get_inputs()]
        unknown = [each.type for each in session.get_inputs() if each.type not in _DTYPES]
        if unknown:
            raise ModelLoadError(f"the graph reads a {unknown[0]}, which no column can be")
        outputs = session.get_outputs()
        named = [each.name for each in outputs if each.name in options.outputs]
        #: Classifiers have a label and then the probabilities; scores are the last output.
        self._outputs = named or [outputs[-1 if options.scores else 0].name]
        if not str(next(o.type for o in outputs if o.name == self._outputs[0])).startswith(
            "tensor"
        ):
            raise ModelLoadError(
                f"output {self._outputs[0]!r} is no tensor: export the model with zipmap off"
            )

    def predict(self, inputs: Columns) -> Any:
        """See `Model`."""
        found = self._session.run(self._outputs, self._feed(inputs))
        if len(found) == 1:
            return found[0]
        return dict(zip(self._outputs, found, strict=True))

    def _feed(self, inputs: Columns) -> dict[str, NDArray[Any]]:
        if len(self._inputs) == 1:
            ((name, dtype),) = self._inputs
            values = inputs.get(name, inputs.get(UNNAMED))
            if values is None:
                values = matrix(inputs, tuple(inputs), dtype)
            return {name: np.ascontiguousarray(values, dtype=dtype)}
        feed = {}
        for name, dtype in self._inputs:
            values = np.asarray(inputs[name], dtype=dtype)
            feed[name] = values.reshape(-1, 1) if values.ndim == 1 else values
        return feed


def load(manifest: Manifest, options: LoadOptions) -> OnnxModel:
    """The session of a version. Raises MissingExtraError, ModelLoadError."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "flavors") from None
    path = manifest.file(str(manifest.flavors["onnx"]["data"]))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = ["CPUExecutionProvider"]
    if options.torch.device != "cpu" and "CUDAExecutionProvider" in _providers(onnxruntime):
        wanted.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=wanted)
    except Exception as error:
        raise ModelLoadError(f"{path.name} cannot be read: {str(error)[:300]}") from None
    on_gpu = session.get_providers()[0] != "CPUExecutionProvider"
    size = sum(each.stat().st_size for each in path.parent.rglob("*.onnx*"))
    return OnnxModel(session, options, size, on_gpu)


def _providers(onnxruntime: Any) -> list[str]:
    return list(onnxruntime.get_available_providers())
