"""Column types: what a column is made of, how values are brought to it, and what fills a gap.

Written as text, ``"float64"``, ``"str"``, ``"float32[3,224,224]"``; the suffix is the shape of
one row's value. ``"any"`` accepts every array. ``"bfloat16"``, which numpy does not have, is
float32 in memory, and rounded where it is sent as that.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import GraphError, did_you_mean

_SCALARS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "datetime64[us]", "str", "any",
}  # fmt: skip
_SPEC = re.compile(r"^(?P<dtype>datetime64\[us\]|[a-z0-9]+)(?:\[(?P<shape>\d+(?:,\s*\d+)*)\])?$")


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A dtype and the shape of one row's value; ``shape`` None accepts every shape."""

    dtype: str
    shape: tuple[int, ...] | None = ()

    @classmethod
    def parse(cls, spec: str) -> "ColumnType":
        """Read ``"float32[30]"``. Raises GraphError for text that is no column type."""
        found = _SPEC.match(spec) if isinstance(spec, str) else None
        if found is None or found["dtype"] not in _SCALARS:
            raise GraphError(
                f"{spec!r} is no column type: expected a dtype with an optional shape, such as "
                f"'float64' or 'float32[30]'.{did_you_mean(str(spec), _SCALARS)}"
            )
        if found["dtype"] == "any":
            return cls("any", None)
        shape = found["shape"]
        return cls(found["dtype"], tuple(int(size) for size in shape.split(",")) if shape else ())

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]" if self.shape else self.dtype

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of an array of this type; object for text and ``any``."""
        if self.dtype == "bfloat16":
            return np.dtype(np.float32)
        return np.dtype(object) if self.dtype in ("str", "any") else np.dtype(self.dtype)

    def accepts(self, other: "ColumnType") -> bool:
        """Whether a column of type ``other`` can be used as this one without losing anything."""
        if "any" in (self.dtype, other.dtype):
            return True
        if self.shape is not None and other.shape is not None and self.shape != other.shape:
            return False
        if self.dtype == other.dtype:
            return True
        if "str" in (self.dtype, other.dtype) or self.dtype == "bfloat16":
            return False
        return _widens(other.numpy_dtype, self.numpy_dtype)

    def conform(self, values: NDArray[Any]) -> NDArray[Any] | None:
        """The array as this type, widened if that loses nothing; None if it does not fit."""
        if self.dtype == "any":
            return values
        if self.shape is not None and values.shape[1:] != self.shape:
            return None
        if self.dtype == "str":
            if values.dtype.kind in "UT":
                return values.astype(object)
            return values if values.dtype.kind == "O" else None
        wanted = self.numpy_dtype
        if values.dtype == wanted:
            return values
        return values.astype(wanted) if _widens(values.dtype, wanted) else None

    def gap(self) -> Any:
        """What stands in a row for which nothing computed this column, or None if nothing can.

        NaN for floats, NaT for times; text and ``any`` are filled with None by :meth:`filled`.
        """
        if self.numpy_dtype.kind == "f":
            return np.nan
        return np.datetime64("NaT") if self.dtype.startswith("datetime") else None

    @property
    def has_gap(self) -> bool:
        """Whether an unfilled row can be told from a filled one."""
        return self.dtype in ("str", "any") or self.gap() is not None

    def filled(self, n: int, value: Any = None) -> NDArray[Any]:
        """n rows of ``value``, or of the gap value when it is None; zeros if there is no gap."""
        shape = (n, *(self.shape or ()))
        fill = self.gap() if value is None else value
        if fill is None and not self.has_gap:
            return np.zeros(shape, dtype=self.numpy_dtype)
        if self.dtype in ("str", "any") and not np.isscalar(fill):
            array = np.empty(shape, dtype=object)
            for position in np.ndindex(array.shape):
                array[position] = fill
            return array
        return np.full(shape, fill, dtype=self.numpy_dtype)


def _widens(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Same kind (or unsigned to signed, or any time unit) and no value lost."""
    if source.kind == "M" and target.kind == "M":
        return True
    same_kind = source.kind == target.kind or (source.kind == "u" and target.kind == "i")
    return same_kind and np.can_cast(source, target, "safe")


def type_of(values: NDArray[Any]) -> ColumnType:
    """The column type of an array, for error texts: object arrays are read as text."""
    kind = values.dtype.kind
    name = "str" if kind in "OUT" else "datetime64[us]" if kind == "M" else values.dtype.name
    return ColumnType(name, values.shape[1:])
