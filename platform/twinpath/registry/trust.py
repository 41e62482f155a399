"""Which versions may run code while they are loaded.

A pickle is a program. So are cloudpickle, joblib, pyfunc models, and PyTorch's ``.pth`` and
``.pt2`` files (`torch.export.load` of torch 2.13 falls back to plain unpickling, and evaluates the
expressions of dynamic shapes). They are loaded only when the node's configuration trusts where they
come from, or pins the very bytes. Weights in safetensors, ONNX, XGBoost's and LightGBM's own files
are data. skops is data too as long as the list of types that it may build is ours: the one beside
the artifact was written by whoever wrote the artifact.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twinpath.errors import ConfigError, UntrustedModelError
from twinpath.registry.manifest import Manifest

#: Flavors of which the first that a version has is loaded.
ORDER = (
    "twinpath_torch", "sklearn", "xgboost", "lightgbm", "onnx", "pytorch", "transformers",
    "python_function",
)  # fmt: skip
#: XGBoost's and LightGBM's own formats, and ONNX.
_DATA_FILES = {
    "xgboost": (".json", ".ubj", ".xgb"),
    "lightgbm": (".lgb", ".txt"),
    "onnx": (".onnx",),
    "twinpath_torch": (".safetensors",),
}


@dataclass(frozen=True, slots=True)
class Format:
    """How a version is stored: its flavor, the kind of its file, and whether loading runs code."""

    flavor: str
    kind: str
    runs_code: bool


@dataclass(frozen=True)
class Trust:
    """Whom the configuration trusts: digests (``sha256:…``) and sources, as glob patterns such as
    ``s3://models-of-ours/*``. A source is where the registry keeps the files of a version, or the
    one that it was registered from. Raises ConfigError for a digest that is none.
    """

    entries: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Sequence[str]) -> "Trust":
        """From the ``trusted=`` of a node."""
        for entry in entries:
            if entry.startswith("sha256:") and len(entry) != 71:
                raise ConfigError(
                    f"trusted: {entry!r} is no digest: expected sha256: and 64 digits"
                )
        return cls(tuple(entries))

    def vouches(self, digest: str, sources: Sequence[str]) -> bool:
        """Whether a version with this digest, of one of these sources, may run code."""
        for entry in self.entries:
            if entry.startswith("sha256:"):
                if entry == digest:
                    return True
            elif any(source and fnmatch.fnmatchcase(source, entry) for source in sources):
                return True
        return False

    def check(self, found: Format, digest: str, sources: Sequence[str]) -> None:
        """Raises UntrustedModelError for a version that would run code and is not trusted."""
        if not found.runs_code or self.vouches(digest, sources):
            return
        raise UntrustedModelError(
            f"it is stored as {found.kind}, which runs code when it is loaded, and neither its "
            f"source {sources[0]!r} nor its digest is trusted: save it in a format that is data "
            f"(skops, ONNX, safetensors, XGBoost JSON), or add {digest!r} to trusted="
        )


def format_of(manifest: Manifest) -> Format:
    """How a version is stored. Unknown is unsafe: whatever is not surely data runs code."""
    for flavor in ORDER:
        if flavor in manifest.flavors:
            return _format(flavor, manifest)
    return Format("python_function", "an unknown flavor", True)


def _format(flavor: str, manifest: Manifest) -> Format:
    options = manifest.flavors[flavor]
    match flavor:
        case "sklearn":
            stored = options.get("serialization_format") or "pickle"
            data = stored == "skops" and is_zip(manifest, options.get("pickled_model"))
            return Format(flavor, str(stored), not data)
        case "transformers":
            return _transformers(flavor, manifest)
        case "pytorch":
            folder = manifest.folder / str(options.get("model_data", "data"))
            kind = "torch.export (.pt2)" if (folder / "model.pt2").is_file() else "a torch pickle"
            return Format(flavor, kind, True)
        case "python_function":
            return Format(flavor, "a pyfunc model", True)
    name = str(options.get("data") or "")
    suffix = Path(name).suffix
    if suffix in _DATA_FILES[flavor]:
        return Format(flavor, f"{flavor} ({suffix})", False)
    if suffix == ".skops" and is_zip(manifest, name):
        return Format(flavor, "skops", False)
    return Format(flavor, suffix.lstrip(".") or "pickle", True)


def _transformers(flavor: str, manifest: Manifest) -> Format:
    """Only weights in safetensors, and no Python files that ``trust_remote_code`` would run."""
    files = [path for path in manifest.folder.rglob("*") if path.is_file()]
    weights = [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".pkl")]
    safe = any(path.suffix == ".safetensors" for path in files)
    if weights or not safe:
        kind = weights[0].name if weights else "weights that are no safetensors"
        return Format(flavor, f"transformers ({kind})", True)
    return Format(flavor, "transformers (safetensors)", False)


def is_zip(manifest: Manifest, name: object) -> bool:
    """Whether a file is a zip archive, as every skops file is; a renamed pickle is not."""
    if not isinstance(name, str):
        return False
    try:
        with manifest.file(name).open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except Exception:
        return False
