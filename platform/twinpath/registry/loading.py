"""From a version's files to a model that may serve: trust, budget, load, signature, checks."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from twinpath.errors import ModelError, ModelLoadError, TwinpathError
from twinpath.graph.columns import Columns, row_count
from twinpath.graph.dtypes import ColumnType
from twinpath.registry import checks, trial
from twinpath.registry.cache import Entry
from twinpath.registry.flavors.model import LoadOptions, Model
from twinpath.registry.manifest import Manifest, read_manifest
from twinpath.registry.memory import GROWTH, Budget, Memory, host_memory, limited
from twinpath.registry.signature import Binding, types_of
from twinpath.registry.trust import Format, Trust, format_of

_LOADERS = {
    "sklearn": "sklearn", "xgboost": "xgboost", "lightgbm": "lightgbm", "onnx": "onnx",
    "pytorch": "pytorch", "twinpath_torch": "pytorch", "transformers": "transformers",
    "python_function": "pyfunc",
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a node asks of every version. ``given``: the columns that it hands over, None when it
    takes whatever comes."""

    given: Mapping[str, ColumnType] | None
    options: LoadOptions
    trust: Trust = field(default_factory=Trust)
    budget: Budget = field(default_factory=Budget)
    golden: bool = True


@dataclass
class LiveModel:
    """A loaded model with its binding; ``host_bytes`` and ``vram_bytes`` are what it holds."""

    model: Model
    binding: Binding
    digest: str
    format: Format
    host_bytes: int
    vram_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def predict(self, columns: Columns) -> Columns:
        """The node's output columns for n rows."""
        given = self.binding.given(columns)
        return self.binding.answer(self.model.predict(given), row_count(columns))


def load_version(
    entry: Entry,
    sources: Sequence[str],
    wanted: Wanted,
    *,
    used_bytes: int = 0,
    recorded: Columns | None = None,
    incumbent: checks.Predict | None = None,
) -> LiveModel:
    """A version's files as a model that passed every check.

    ``sources``: where it came from, for trust. ``used_bytes``: what other versions of the node
    hold. ``recorded``: rows that the node was asked lately, to warm up with; ``incumbent`` answers
    the same rows now. Raises ModelError of the kind that says what is wrong.
    """
    manifest = read_manifest(entry.folder)
    found = format_of(manifest)
    wanted.trust.check(found, entry.digest, sources)
    need = int(entry.size_bytes * GROWTH)
    allowed = wanted.budget.admit(need, used_bytes, host_memory())
    _admit_vram(entry.size_bytes, wanted)
    given = wanted.given
    if given is None:
        given = types_of(recorded) if recorded else _from_signature(manifest)
    given = dict(given)
    # What can be said without loading is said without loading.
    binding = Binding(manifest.signature, given, wanted.options.outputs)
    if found.runs_code:
        # Its code may do anything, so it shows in a process of its own that it can be loaded.
        trial.run(manifest.folder, found, wanted.options, given, allowed)
    model = load_model(manifest, found, wanted.options, allowed)
    live = LiveModel(
        model, binding, entry.digest, found, model.host_bytes or entry.size_bytes, model.vram_bytes
    )
    _check(live, manifest, given, wanted, recorded, incumbent)
    return live


def load_model(
    manifest: Manifest, found: Format, options: LoadOptions, allowed_bytes: int
) -> Model:
    """The model alone. Raises ModelError; ModelLoadError when it asks for more memory than
    ``allowed_bytes``, about, or when its loader raises."""
    loader = importlib.import_module(f"twinpath.registry.flavors.{_LOADERS[found.flavor]}")
    try:
        with limited(allowed_bytes):
            model: Model = loader.load(manifest, options)
            return model
    except TwinpathError:
        raise
    except MemoryError:
        raise _hog(allowed_bytes) from None
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise ModelLoadError(f"{type(error).__name__}: {text}") from error


def _check(
    live: LiveModel,
    manifest: Manifest,
    given: Mapping[str, ColumnType],
    wanted: Wanted,
    recorded: Columns | None,
    incumbent: checks.Predict | None,
) -> None:
    types = {name: kind for name, kind in given.items() if name in live.binding.names}
    golden = checks.read_golden(manifest, types) if wanted.golden else None
    example = checks.read_example(manifest, types)
    if example is not None:
        checks.check_answers(live.predict, example, "the input example")
    if recorded:
        checks.check_answers(live.predict, recorded, "rows that were asked lately")
    if golden is not None:
        checks.check_golden(live.predict, golden)
    rows = recorded or example or (golden.inputs if golden else None)
    if rows is None:
        rows = checks.made_up(types)
        live.notes.append("warmed up with made-up rows: it has no input example")
        if rows is None:
            return
        live.predict(rows)
    if incumbent is not None:
        try:
            incumbent(rows)
        except Exception:
            return  # the example is not of columns that what serves knows
        checks.check_speed(live.predict, incumbent, rows)


def _from_signature(manifest: Manifest) -> dict[str, ColumnType]:
    inputs = manifest.signature.inputs or ()
    return {column.name or "": column.type for column in inputs}


def _admit_vram(size_bytes: int, wanted: Wanted) -> None:
    """The same for the GPU's memory, where torch has a GPU at all."""
    import sys

    torch = sys.modules.get("torch")
    if wanted.options.torch.device == "cpu" or torch is None or not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    Budget(None, wanted.budget.headroom).admit(size_bytes, 0, Memory(total, free), "GPU")


def _hog(allowed_bytes: int) -> ModelError:
    from twinpath.errors import MemoryBudgetError

    return MemoryBudgetError(
        f"it asked for more memory while it was loaded than the {allowed_bytes / 2**20:,.0f} MiB "
        "that it may take"
    )
