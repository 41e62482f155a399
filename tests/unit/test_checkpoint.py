"""The record of a resumable job: which rows are done, whatever was killed when."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpath.errors import BatchJobError
from twinpath.offline.checkpoint import Checkpoint, from_text, runs_of, to_text
from twinpath.offline.positions import POSITION, PositionedSource, read_pieces

JOB = {"graph": "orders", "source": [{"file": "a.parquet", "rows": 10, "fingerprint": "x"}]}


def table(rows) -> pa.Table:
    return pa.table({"id": pa.array(list(rows), pa.int64())})


def ids(folder: Path) -> list[int]:
    if not list(folder.rglob("*.parquet")):
        return []
    return sorted(pq.read_table(folder).column("id").to_pylist())


@given(st.sets(st.integers(0, 200)))
def test_positions_survive_being_written_as_ranges(positions):
    runs = from_text(to_text(runs_of(positions)))
    assert sorted(positions) == [row for start, stop in runs for row in range(start, stop)]
    assert all(stop < start for (_, stop), (start, _) in pairwise(runs))


def test_a_batch_is_done_once_its_file_is_there_with_its_failed_rows_counted(tmp_path):
    record = Checkpoint(tmp_path / "sink", tmp_path / "dead")
    attempt = record.begin(JOB)
    attempt.commit(runs_of(range(4)), table([0, 1, 3]), table([2]))
    attempt.commit(runs_of([7, 8]), None, table([7, 8]))
    assert record.done(10).nonzero()[0].tolist() == [0, 1, 2, 3, 7, 8]
    record.finish()
    assert record.done(10).nonzero()[0].tolist() == [0, 1, 2, 3, 7, 8]
    assert (ids(tmp_path / "sink"), ids(tmp_path / "dead")) == ([0, 1, 3], [2, 7, 8])


def test_a_worker_that_outlives_its_attempt_can_commit_nothing_more(tmp_path):
    record = Checkpoint(tmp_path / "sink", tmp_path / "dead")
    old = record.begin(JOB)
    old.commit(runs_of([0, 1]), table([0, 1]), None)
    new = Checkpoint(tmp_path / "sink", tmp_path / "dead").begin(JOB)
    with pytest.raises(BatchJobError, match="took it over"):
        old.commit(runs_of([2, 3]), table([2]), table([3]))
    new.commit(runs_of([2, 3]), table([2]), table([3]))
    record.finish()
    assert (ids(tmp_path / "sink"), ids(tmp_path / "dead")) == ([0, 1, 2], [3])


def test_dead_letters_of_a_batch_that_was_not_committed_are_removed(tmp_path, monkeypatch):
    record = Checkpoint(tmp_path / "sink", tmp_path / "dead")
    attempt = record.begin(JOB)
    rename = Path.replace

    def killed_before_the_commit(self, target):
        if Path(target).is_relative_to(tmp_path / "sink"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", killed_before_the_commit)
    with pytest.raises(KeyboardInterrupt):
        attempt.commit(runs_of([0, 1]), table([0]), table([1]))
    monkeypatch.undo()
    assert ids(tmp_path / "dead") == [1]
    again = record.begin(JOB)
    assert ids(tmp_path / "dead") == []
    assert not record.done(10).any()
    again.commit(runs_of([0, 1]), table([0, 1]), None)
    record.finish()
    assert (ids(tmp_path / "sink"), ids(tmp_path / "dead")) == ([0, 1], [])
    assert not list(tmp_path.rglob("*.partial"))


def test_a_batch_that_is_run_twice_is_there_once(tmp_path):
    record = Checkpoint(tmp_path / "sink", tmp_path / "dead")
    attempt = record.begin(JOB)
    attempt.commit(runs_of([0, 1]), table([0]), table([1]))
    attempt.commit(runs_of([0, 1]), table([0, 1]), None)
    record.finish()
    assert (ids(tmp_path / "sink"), ids(tmp_path / "dead")) == ([0, 1], [])


def test_a_sink_of_another_job_is_refused_with_what_differs(tmp_path):
    record = Checkpoint(tmp_path / "sink", tmp_path / "dead")
    record.begin(JOB)
    with pytest.raises(BatchJobError, match='another graph: there it is "orders", here "bills"'):
        record.begin(JOB | {"graph": "bills"})


def test_a_folder_with_other_files_is_no_sink_to_resume(tmp_path):
    (tmp_path / "sink").mkdir()
    pq.write_table(table([1]), tmp_path / "sink" / "other.parquet")
    with pytest.raises(BatchJobError, match="was not begun with resume=True"):
        Checkpoint(tmp_path / "sink", tmp_path / "dead").begin(JOB)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 60))
def test_whatever_is_killed_when_each_row_ends_up_in_exactly_one_place(
    tmp_path_factory, seed, rows
):
    folder, source = tmp_path_factory.mktemp("job"), random.Random(seed)
    record = Checkpoint(folder / "sink", folder / "dead")
    stale = []
    while True:
        attempt = record.begin(JOB)
        for old, batch in stale:
            with pytest.raises(BatchJobError):
                old.commit(runs_of(batch), table(batch), None)
        todo = np.flatnonzero(~record.done(rows)).tolist()
        if not todo:
            break
        source.shuffle(todo)
        while todo and source.random() < 0.8:
            size = source.randint(1, 8)
            batch, todo = sorted(todo[:size]), todo[size:]
            good = [row for row in batch if row % 7]
            bad = [row for row in batch if not row % 7]
            answered = table(good) if good else None
            attempt.commit(runs_of(batch), answered, table(bad) if bad else None)
        stale = [(attempt, sorted(todo[:3]))] if todo else []
    record.finish()
    assert sorted(ids(folder / "sink") + ids(folder / "dead")) == list(range(rows))
    assert ids(folder / "dead") == [row for row in range(rows) if not row % 7]


def read(pieces) -> list[tuple[int, int]]:
    from dataclasses import asdict

    found = []
    for piece in pieces:
        for part in read_pieces(pa.Table.from_pylist([asdict(piece)])):
            found += zip(*(part.column(n).to_pylist() for n in ("id", POSITION)), strict=True)
    return found


@settings(max_examples=30, deadline=None)
@given(
    group=st.integers(1, 40), wanted=st.integers(1, 30), done=st.sets(st.integers(0, 99)),
)  # fmt: skip
def test_pieces_hold_every_row_that_is_not_done_once_whatever_the_row_groups(
    tmp_path_factory, group, wanted, done
):
    folder = tmp_path_factory.mktemp("source")
    pq.write_table(table(range(60)), folder / "a.parquet", row_group_size=group)
    pq.write_table(table(range(60, 100)), folder / "b.parquet", row_group_size=group)
    source = PositionedSource(folder, folder / "sink")
    mask = np.isin(np.arange(100), list(done))
    rows = read(source.pieces(mask, wanted))
    assert sorted(rows) == [(row, row) for row in range(100) if row not in done]


def test_a_source_is_told_from_another_by_its_content_and_not_by_its_date(tmp_path):
    pq.write_table(table(range(10)), tmp_path / "a.parquet")
    first = PositionedSource(tmp_path / "a.parquet", tmp_path / "sink").identity
    pq.write_table(table(range(10)), tmp_path / "a.parquet")
    assert PositionedSource(tmp_path / "a.parquet", tmp_path / "sink").identity == first
    pq.write_table(table(range(1, 11)), tmp_path / "a.parquet")
    assert PositionedSource(tmp_path / "a.parquet", tmp_path / "sink").identity != first


def test_frames_and_csv_files_get_positions_by_a_copy_beside_the_sink(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"id": range(5)})
    frame.to_csv(tmp_path / "a.csv", index=False)
    for given_source in (frame, tmp_path / "a.csv", table(range(5))):
        source = PositionedSource(given_source, tmp_path / "sink")
        assert read(source.pieces(np.zeros(5, bool), 1)) == [(i, i) for i in range(5)]
        assert source.names == ["id"]
    with pytest.raises(BatchJobError, match=r"resume=True cannot read range.*Parquet first"):
        PositionedSource(range(3), tmp_path / "sink")
