"""What the files of a version say of themselves: MLmodel, read without running anything.

https://mlflow.org/docs/latest/ml/model/ (the MLmodel file and its signature).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinpath.errors import ArtifactError, MissingExtraError
from twinpath.graph.dtypes import ColumnType

MLMODEL = "MLmodel"
#: MLflow's column types → ours.
_COLUMN_TYPES = {
    "boolean": "bool", "integer": "int32", "long": "int64", "float": "float32",
    "double": "float64", "string": "str", "datetime": "datetime64[us]",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelColumn:
    """One input or output of a model. ``name`` is None for a tensor without one."""

    name: str | None
    type: ColumnType
    required: bool = True


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """Columns in and out, in the order in which the model reads them. None: not said."""

    inputs: tuple[ModelColumn, ...] | None = None
    outputs: tuple[ModelColumn, ...] | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """An MLmodel file: flavor name → its settings, the signature, the example's file."""

    folder: Path
    flavors: Mapping[str, Mapping[str, Any]]
    signature: ModelSignature = field(default_factory=ModelSignature)
    example: Mapping[str, Any] | None = None

    def file(self, relative: str) -> Path:
        """A file of the version. Raises ArtifactError if it is not there, or not below it."""
        path = (self.folder / relative).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ArtifactError(f"MLmodel names {relative!r}, which is outside of the version")
        if not path.exists():
            raise ArtifactError(f"MLmodel names {relative!r}, which is not among the files")
        return path


def read_manifest(folder: Path) -> Manifest:
    """The MLmodel file of a folder. Raises ArtifactError for one that cannot be read."""
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("pyyaml", "registry") from None
    path = folder / MLMODEL
    if not path.is_file():
        raise ArtifactError(f"there is no {MLMODEL} file: this is no MLflow model")
    try:
        document = yaml.safe_load(path.read_text())
        flavors = {str(name): dict(options or {}) for name, options in document["flavors"].items()}
        signature = _signature(document.get("signature"))
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{MLMODEL} cannot be read: {type(error).__name__}: {error}") from None
    return Manifest(folder, flavors, signature, document.get("saved_input_example_info"))


def _signature(given: Mapping[str, Any] | None) -> ModelSignature:
    if not given:
        return ModelSignature()
    return ModelSignature(_columns(given.get("inputs")), _columns(given.get("outputs")))


def _columns(text: str | None) -> tuple[ModelColumn, ...] | None:
    if not text:
        return None
    return tuple(_column(entry) for entry in json.loads(text))


def _column(entry: Mapping[str, Any]) -> ModelColumn:
    required = bool(entry.get("required", True))
    name = entry.get("name")
    if entry.get("type") == "tensor":
        tensor = entry["tensor-spec"]
        shape = tuple(int(size) for size in tensor["shape"][1:])
        dtype = str(tensor["dtype"])
        dtype = "str" if dtype in ("str", "object") else dtype
        fixed = None if any(size < 0 for size in shape) else shape
        try:
            kind = ColumnType.parse(dtype)
        except Exception:
            kind = ColumnType("any", None)
        return ModelColumn(name, ColumnType(kind.dtype, fixed), required)
    dtype = _COLUMN_TYPES.get(str(entry.get("type")), "any")
    return ModelColumn(name, ColumnType(dtype, None if dtype == "any" else ()), required)
