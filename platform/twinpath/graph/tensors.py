"""Tensor fields of a typed edge: ``x: Annotated[NDArray[Any], Tensor("float32[30]")]``."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from twinpath.errors import GraphError
from twinpath.graph.dtypes import ColumnType

_JSON_KINDS = {"b": "boolean", "i": "integer", "u": "integer", "f": "number"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Metadata that makes a pydantic field a tensor: ``"float32[3,224,224]"`` is the dtype and
    the shape of one row's value.

    A row's value may be nested lists or an array; a whole column is one array of shape
    ``(n, ...)``. dtype and shape are checked, single numbers are not: NaN and infinities pass.
    Raises GraphError for text that is no numeric column type.
    """

    spec: str

    def __post_init__(self) -> None:
        if self.type.dtype in ("str", "any", "datetime64[us]"):
            raise GraphError(f"Tensor({self.spec!r}): expected a numeric or bool dtype")

    @property
    def type(self) -> ColumnType:
        """The column type that the field has."""
        return ColumnType.parse(self.spec)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(np.ndarray.tolist),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        kind = self.type
        described: dict[str, Any] = {"type": _JSON_KINDS[kind.numpy_dtype.kind]}
        for size in reversed(kind.shape or ()):
            described = {
                "type": "array", "items": described, "minItems": size, "maxItems": size,
            }  # fmt: skip
        return described

    def _validate(self, value: Any) -> NDArray[Any]:
        kind = self.type
        try:
            given = np.asarray(value)
        except ValueError:
            raise ValueError(f"expected {kind}, got lists of different lengths") from None
        wanted = kind.numpy_dtype
        if given.shape != kind.shape:
            raise ValueError(f"expected shape {kind.shape}, got {given.shape}")
        if given.dtype == wanted:
            return given
        number = given.dtype.kind in "iuf" and wanted.kind in "iuf"
        if not number or (given.dtype.kind == "f" and wanted.kind != "f"):
            raise ValueError(f"expected {kind}, got values of type {given.dtype}")
        if wanted.kind in "iu" and given.size:
            limits = np.iinfo(wanted)
            if given.min() < limits.min or given.max() > limits.max:
                raise ValueError(f"expected {kind}, got a number beyond its range")
        with np.errstate(over="ignore"):
            return given.astype(wanted)
