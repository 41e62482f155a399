"""Where and how torch runs a model: device, precision, compiling, transfer, CUDA graphs.

Everything about CUDA is behind ``device.type == "cuda"``: on a CPU none of it is reached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError, MissingExtraError

#: A shape that was asked for so often is worth a CUDA graph of its own.
_GRAPH_AFTER = 3
#: Shapes that get a CUDA graph; each holds its buffers in the GPU's memory.
_GRAPHS_MAX = 16


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """``dtype``: the model's floating point weights and inputs; None leaves what it has.
    ``compile``: `torch.compile`, whose first call of each shape takes seconds. ``cuda_graphs``:
    replay the kernels of shapes that come often (batches are padded to the next power of two)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool = False
    cuda_graphs: bool = False


def torch_module() -> Any:
    """The torch package. Raises MissingExtraError."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "flavors") from None
    return torch


class TorchRunner:
    """Runs a module on numpy arrays: (n, …) in, (n, …) out, as float32 where torch has bf16/fp16.

    Raises ConfigError where the options ask for CUDA and there is none.
    """

    def __init__(self, module: Any, options: TorchOptions, exported: bool = False) -> None:
        torch = self._torch = torch_module()
        cuda = bool(torch.cuda.is_available())
        if options.device == "cuda" and not cuda:
            raise ConfigError("device 'cuda' is asked for and this process has none: use 'auto'")
        self.device = torch.device("cuda" if cuda and options.device != "cpu" else "cpu")
        self._dtype = getattr(torch, options.dtype) if options.dtype else None
        module = module.to(device=self.device)
        if self._dtype is not None:
            module = module.to(dtype=self._dtype)
        if not exported:  # an exported program has no other mode
            module.eval()
        self._call: Callable[..., Any] = torch.compile(module) if options.compile else module
        self._module = module
        self._graphs = (
            _Graphs(torch, self._call)
            if options.cuda_graphs and self.device.type == "cuda"
            else None
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        tensors = [*self._module.parameters(), *self._module.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def run(self, values: NDArray[Any]) -> NDArray[Any]:
        """The module's answer to one tensor."""
        with self._torch.inference_mode():
            tensor = self._put(values)
            found = self._graphs.run(tensor) if self._graphs is not None else self._call(tensor)
            return self._take(found)

    def run_named(self, inputs: dict[str, Any]) -> Any:
        """The module's own answer to named tensors that are on the CPU."""
        with self._torch.inference_mode():
            return self._call(**{n: self._moved(t) for n, t in inputs.items()})

    def _put(self, values: NDArray[Any]) -> Any:
        values = np.ascontiguousarray(values)
        if not values.flags.writeable:
            values = values.copy()  # torch has no read-only tensors, and warns
        tensor = self._torch.from_numpy(values)
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return self._moved(tensor)

    def _moved(self, tensor: Any) -> Any:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _take(self, found: Any) -> NDArray[Any]:
        if isinstance(found, (tuple, list)):
            found = found[0]
        if found.dtype in (self._torch.bfloat16, self._torch.float16):
            found = found.float()
        array: NDArray[Any] = found.cpu().numpy()
        return array


class _Graphs:
    """CUDA graphs by shape: captured once a shape was asked for some times, then replayed."""

    def __init__(self, torch: Any, call: Callable[..., Any]) -> None:
        self._torch, self._call = torch, call
        self._seen: dict[tuple[int, ...], int] = {}
        self._captured: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}

    def run(self, tensor: Any) -> Any:
        n = tensor.shape[0]
        padded = 1 << max(0, n - 1).bit_length()
        shape = (padded, *tensor.shape[1:])
        if shape not in self._captured:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] < _GRAPH_AFTER or len(self._captured) >= _GRAPHS_MAX:
                return self._call(tensor)
            self._captured[shape] = self._capture(tensor, shape)
        graph, given, answer = self._captured[shape]
        given[:n].copy_(tensor)
        graph.replay()
        return answer[:n].clone()

    def _capture(self, tensor: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
        torch = self._torch
        given = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        given[: tensor.shape[0]].copy_(tensor)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._call(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self._call(given)
            if isinstance(answer, (tuple, list)):
                answer = answer[0]
        return graph, given, answer
