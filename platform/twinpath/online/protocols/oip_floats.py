"""The plainest JSON request of floating-point tensors, read by simdjson straight into arrays.

orjson makes a Python object of each number, which is most of what a request of many rows costs.
Whatever is not plain is left to the longer way, and to its errors.

Langdale and Lemire: Parsing gigabytes of JSON per second, https://arxiv.org/abs/1902.08318.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import simdjson

from twinpath.graph.columns import Columns

#: Bodies below this are as fast with orjson.
LEAST_BYTES = 2048
_DTYPES = {"FP32": np.float32, "FP64": np.float64}
#: What simdjson raises for text that is no JSON, and for values of other kinds than are asked for.
_NOT_PLAIN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class FloatTensors:
    """Reads requests that give each of the model's inputs, by name → (datatype, shape below the
    rows), as a flat list of numbers, and nothing else. For one thread at a time."""

    def __init__(self, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
        self._tensors = tensors
        self._lists = 1 + 2 * len(tensors)
        self._parser = simdjson.Parser()

    @staticmethod
    def can_read(tensors: Mapping[str, tuple[str, list[int]]]) -> bool:
        """Whether these are all of floating point."""
        return all(datatype in _DTYPES for datatype, _ in tensors.values())

    def columns(self, body: bytes) -> Columns | None:
        """The columns, or None for a request that is not as plain as that."""
        if not self._has_only_flat_lists(body):
            return None
        try:
            return self._read(body)
        except _NOT_PLAIN:
            # One that is still referred to cannot be used again.
            self._parser = simdjson.Parser()
            return None

    def _has_only_flat_lists(self, body: bytes) -> bool:
        """simdjson flattens nested ones, whatever their lengths."""
        at = -1
        for _ in range(self._lists):
            at = body.find(b"[", at + 1)
            if at < 0:
                return False
        return body.find(b"[", at + 1) < 0

    def _read(self, body: bytes) -> Columns | None:
        document: Any = self._parser.parse(body)
        inputs = document["inputs"]
        if len(document) != 1 or len(inputs) != len(self._tensors):
            return None
        columns: Columns = {}
        rows = -1
        for tensor in inputs:
            datatype, below = self._tensors[tensor["name"]]
            shape = tensor["shape"].as_list()
            if len(tensor) != 4 or tensor["datatype"] != datatype or shape[1:] != below:
                return None
            if rows not in (-1, shape[0]):
                return None
            rows = shape[0]
            values = np.frombuffer(tensor["data"].as_buffer(of_type="d"), np.float64)
            with np.errstate(over="ignore"):
                found = values.astype(_DTYPES[datatype])
            if type(rows) is not int or not np.isfinite(found).all():
                return None
            columns[tensor["name"]] = found.reshape(shape)
        return columns if len(columns) == len(self._tensors) else None
