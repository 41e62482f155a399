"""A plan as a batch job on Ray Data: one ``map_batches`` per stage."""

import inspect
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinpath.errors import BatchJobError, MissingExtraError, did_you_mean
from twinpath.graph.node import FeatureTime
from twinpath.graph.plan import Plan, Stage
from twinpath.offline.checkpoint import FOLDER, Attempt, Checkpoint
from twinpath.offline.positions import PositionedSource, dataset_of
from twinpath.offline.stages import StageCall

if TYPE_CHECKING:
    from ray.data import Dataset

    from twinpath.features.sink import FeatureSink

#: Share of a CPU that a fused actor asks for; the rest lets reads and writes be scheduled, also
#: on a single CPU.
FUSED_NUM_CPUS = 0.5
IO_NUM_CPUS = 0.2
#: Blocks a source is read as, for each worker: enough that all workers end at about the same time,
#: few enough that the cost of a task does not show. Ray splits those above its largest block size.
BLOCKS_PER_WORKER = 6


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job did. ``duration_s`` counts from start of execution to the last file written;
    ``resumed_rows`` of the rows were done before, by earlier attempts; ``pushed`` of them were
    written to a feature view afterwards."""

    rows: int
    dead_letters: int
    duration_s: float
    sink: str
    dead_letters_path: str
    resumed_rows: int = 0
    pushed: int = 0

    @property
    def rows_per_s(self) -> float:
        """Rows of this run, answered or not, in a second."""
        rows = self.rows + self.dead_letters - self.resumed_rows
        return rows / self.duration_s if self.duration_s else 0.0


class Job:
    """``Job(plan, source, sink).run()``: score a source through the graph into Parquet.

    ``source`` is a Parquet or CSV path, a pandas DataFrame, an Arrow table or a Ray Dataset; it
    has the columns of the graph's input, and may have others. ``keep`` names source columns to
    copy to the output. Rows that fail go to ``dead_letters`` (default: ``<sink>.dead_letters``).
    ``batch_size`` is in rows; ``workers`` is the number of actors of each fused stage (default:
    the CPUs that are free in the cluster). ``features`` says whether feature nodes give what was
    known at each row's moment, or read the online store as it is now. ``push_to`` is a
    `FeatureSink`, or the name of a view in the repository of the graph's FeatureLookup: once the
    sink is complete, its rows become features there. Raises BatchJobError.

    With ``resume=True`` the job commits batch by batch. Killed at any moment and run again, it
    leaves out the rows that are done, and sink and dead letters hold each row exactly once; see
    :mod:`twinpath.offline.checkpoint`. ``in_flight`` is the number of batches that an actor runs
    at a time where a node's ``predict`` is async, as an engine's that batches by itself.
    """

    def __init__(
        self,
        plan: Plan,
        source: Any,
        sink: str | Path | None = None,
        *,
        keep: Sequence[str] = (),
        dead_letters: str | Path | None = None,
        batch_size: int = 8192,
        workers: int | None = None,
        overwrite: bool = False,
        resume: bool = False,
        in_flight: int = 1,
        features: FeatureTime = "as_of",
        push_to: "FeatureSink | str | None" = None,
    ) -> None:
        if features not in ("as_of", "now"):
            raise BatchJobError(f"features={features!r}: expected 'as_of' or 'now'")
        self.plan, self.source = plan.offline(features), source
        self.sink = Path(sink).absolute() if sink is not None else None
        self.keep = tuple(keep)
        self.batch_size, self.workers, self.overwrite = batch_size, workers, overwrite
        self.resume, self.in_flight, self.features = resume, in_flight, features
        default = self.sink.with_name(self.sink.name + ".dead_letters") if self.sink else None
        self.dead_letters = Path(dead_letters).absolute() if dead_letters else default
        clash = set(self.keep) & set(plan.output_schema.fields)
        if clash:
            raise BatchJobError(
                f"keep={sorted(clash)} are also output columns of graph {plan.graph_name!r}: "
                "leave them out of keep, or rename them in the source"
            )
        self.push_to = None if push_to is None else _feature_sink(plan, push_to)

    def dataset(self) -> "Dataset":
        """The lazy output dataset: output columns, ``keep``, and ``__error__`` (JSON text; empty
        or null for a row that succeeded). Rows keep their order and number."""
        return self._pipeline(dead_letters=None)

    def rows(self) -> "Dataset":
        """The lazy source, as the job reads it. Raises BatchJobError when it lacks a column."""
        dataset = self._read(_ray_data(), self._workers())
        self._check_source(dataset)
        return dataset

    def run(self) -> Summary:
        """Run to the end and write the sink. Raises BatchJobError when the sink is not empty
        (and ``overwrite`` is not set) or the source lacks a column."""
        if self.sink is None or self.dead_letters is None:
            raise BatchJobError("this job has no sink: give one, or read job.dataset()")
        if self.push_to is not None:
            self.push_to.check([*self.plan.output_schema.fields, *self.keep])
        way = self._run_resumable if self.resume else self._run_once
        done = way(self.sink, self.dead_letters)
        if self.push_to is None or not done.rows:
            return done
        return replace(done, pushed=self.push_to.write(self.sink))

    def _run_once(self, sink: Path, dead_letters: Path) -> Summary:
        self._prepare_sink()
        started = time.perf_counter()
        self._pipeline(str(dead_letters)).write_parquet(
            str(sink),
            ray_remote_args={"num_cpus": IO_NUM_CPUS},
            concurrency=_io_tasks(self._workers()),
        )
        duration_s = time.perf_counter() - started
        return Summary(
            count_rows(sink), count_rows(dead_letters), duration_s, str(sink), str(dead_letters)
        )

    def _run_resumable(self, sink: Path, dead_letters: Path) -> Summary:
        if self.overwrite:
            self._prepare_sink()
        data, workers = _ray_data(), self._workers()
        source = PositionedSource(self.source, sink)
        self._check_names(source.names)
        checkpoint = Checkpoint(sink, dead_letters)
        attempt = checkpoint.begin(self._identity() | {"source": source.identity})
        done = checkpoint.done(source.rows)
        pieces = source.pieces(done, BLOCKS_PER_WORKER * workers)
        started = time.perf_counter()
        if pieces:
            rows = dataset_of(data, pieces, IO_NUM_CPUS)
            self._staged(data, rows, workers, None, attempt).materialize()
        checkpoint.finish()
        duration_s = time.perf_counter() - started
        missing = int((~checkpoint.done(source.rows)).sum())
        if missing:
            raise BatchJobError(f"{missing} rows of the source were not committed: run it again")
        return Summary(
            count_rows(sink), count_rows(dead_letters), duration_s,
            str(sink), str(dead_letters), int(done.sum()),
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """What must be the same for attempts to belong to one job; plain JSON values."""
        told = {
            step.name: step.node.identity()
            for step in self.plan.steps
            if hasattr(step.node, "identity")
        }
        return {
            "graph": self.plan.graph_name,
            "nodes": [step.name for step in self.plan.steps],
            "output": {name: str(kind) for name, kind in self.plan.output_schema.fields.items()},
            "keep": list(self.keep),
            "features": self.features,
        } | ({"setting": told} if told else {})

    def _prepare_sink(self) -> None:
        for folder in (self.sink, self.dead_letters):
            if folder is None or not folder.exists() or not any(folder.iterdir()):
                continue
            if not self.overwrite:
                raise BatchJobError(
                    f"{folder} is not empty: choose another sink, or pass overwrite=True to "
                    "replace what is there (resume=True goes on with a job begun so)"
                )
            shutil.rmtree(folder)

    def _pipeline(self, dead_letters: str | None) -> "Dataset":
        data = _ray_data()
        workers = self._workers()
        dataset = self._read(data, workers)
        self._check_source(dataset)
        dataset = self._staged(data, dataset, workers, dead_letters, None)
        dataset.context.execution_options.preserve_order = True
        return dataset

    def _staged(
        self,
        data: Any,
        dataset: "Dataset",
        workers: int,
        dead_letters: str | None,
        attempt: Attempt | None,
    ) -> "Dataset":
        for stage in self.plan.stages:
            dataset = dataset.map_batches(
                StageCall,
                fn_constructor_args=(self.plan, stage.index, self.keep, dead_letters, attempt),
                batch_size=self._batch_size(stage),
                batch_format="numpy",
                **self._resources(data, stage, workers),
            )
        return dataset

    def _workers(self) -> int:
        return self.workers or _free_cpus()

    def _batch_size(self, stage: Stage) -> int:
        return self.batch_size if stage.placement is None else stage.placement.batch.max_size

    def _resources(self, data: Any, stage: Stage, workers: int) -> Mapping[str, Any]:
        """Actors of a stage: a fixed pool when fused, ``Replicas`` when placed."""
        calls: dict[str, Any] = {}
        if self.in_flight > 1 and any(waits(step.node) for step in stage.steps):
            calls["max_concurrent_calls_per_actor"] = self.in_flight
            calls["enable_true_multi_threading"] = True
        if stage.placement is None:
            pool = data.ActorPoolStrategy(size=workers, **calls)
            return {"compute": pool, "num_cpus": FUSED_NUM_CPUS}
        replicas = stage.placement.replicas
        low, high = max(1, replicas.min), replicas.max
        pool = data.ActorPoolStrategy(min_size=low, max_size=high, **calls)
        return {"compute": pool, **stage.placement.ray_actor_options()}

    def _read(self, data: Any, workers: int) -> "Dataset":
        source = self.source
        blocks = BLOCKS_PER_WORKER * workers
        if isinstance(source, (str, Path)):
            path = Path(source).absolute()
            if not path.exists():
                raise BatchJobError(f"source {str(source)!r} does not exist")
            readers = {".csv": data.read_csv}
            read = readers.get(path.suffix, data.read_parquet)
            with data.DataContext.current(_read_context(data)):
                return read(
                    str(path), override_num_blocks=blocks,
                    num_cpus=IO_NUM_CPUS, concurrency=_io_tasks(workers),
                )  # fmt: skip
        if isinstance(source, data.Dataset):
            return source
        if hasattr(source, "to_pandas") and hasattr(source, "schema"):
            return data.from_arrow(source).repartition(blocks)
        if hasattr(source, "columns") and hasattr(source, "iloc"):
            return data.from_pandas(source, override_num_blocks=blocks)
        raise BatchJobError(
            f"cannot read {type(source).__name__}: expected a Parquet or CSV path, a DataFrame, "
            "an Arrow table or a Ray Dataset"
        )

    def _check_source(self, dataset: "Dataset") -> None:
        schema = dataset.schema()
        self._check_names(schema.names if schema is not None else ())

    def _check_names(self, present: Iterable[str]) -> None:
        names = set(present)
        required = set(self.plan.input_schema.fields) - set(self.plan.input_schema.defaults())
        for name in (*sorted(required), *self.keep):
            if name not in names:
                raise BatchJobError(
                    f"the source has no column {name!r}, which graph {self.plan.graph_name!r} "
                    f"needs.{did_you_mean(name, names)}"
                )


def _feature_sink(plan: Plan, push_to: "FeatureSink | str") -> "FeatureSink":
    """The sink that is meant; a view's name is of the repository of the graph's lookups."""
    from twinpath.features.sink import FeatureSink
    from twinpath.nodes.features import FeatureLookup

    if isinstance(push_to, FeatureSink):
        return push_to
    repos = [step.node.repo for step in plan.steps if isinstance(step.node, FeatureLookup)]
    if not repos or any(repo != repos[0] for repo in repos):
        raise BatchJobError(
            f"push_to={push_to!r}: graph {plan.graph_name!r} has no FeatureLookup, or several with "
            "different repositories: give FeatureSink(view, repo)"
        )
    return FeatureSink(push_to, repos[0])


def count_rows(folder: Path) -> int:
    """Rows in a folder's Parquet files, read from their footers; 0 when there is none."""
    import pyarrow.parquet as pq

    files = (file for file in folder.glob("**/*.parquet") if FOLDER not in file.parts)
    return sum(pq.read_metadata(file).num_rows for file in files)


def waits(node: object) -> bool:
    """Whether a node's predict is a coroutine, so that several batches can run at a time."""
    return inspect.iscoroutinefunction(getattr(node, "predict", None))


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError:
        raise MissingExtraError("ray", "offline") from None
    return ray.data


def _read_context(data: Any) -> Any:
    """The second version of Ray's Parquet reader starts actors for the footers, and reads files
    that are small in bytes as one block, whatever number was asked for."""
    context = data.DataContext.get_current().copy()
    context.use_datasource_v2 = False
    return context


def _io_tasks(workers: int) -> int:
    """Readers, and writers, at a time: each is a process to start, and one keeps up with many
    workers."""
    return max(1, workers // 2)


def _free_cpus() -> int:
    import ray

    if not ray.is_initialized():
        ray.init()
    return max(1, int(ray.available_resources().get("CPU", 1)))
