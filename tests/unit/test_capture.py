"""Captured rows: what is written, what is bounded, and that nobody is held up."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twinpath.errors import ConfigError
from twinpath.features.capture_rows import columns_of
from twinpath.graph.columns import ROW_ERROR
from twinpath.observe import capture
from twinpath.observe.capture import Recorder, read_capture


def batch(start: int, n: int = 10):
    given = {
        "user": np.array([f"u{i}" if i % 3 else None for i in range(start, start + n)], object)
    }
    made = {"spent": np.arange(start, start + n) * 0.5, ROW_ERROR: np.full(n, None, object)}
    return given, np.arange(start, start + n).astype(np.int64), made


def test_rows_come_back_as_they_were_seen(tmp_path):
    recorder = Recorder(tmp_path, {"service": "all"}, flush_s=60)
    recorder.record(*batch(0))
    recorder.record(*batch(10))
    recorder.close()
    about, table = read_capture(tmp_path)
    assert about == {"service": "all"}
    columns, moments = columns_of(table)
    assert moments.tolist() == list(range(20))
    assert set(columns) == {"user", "spent"}
    assert columns["user"].tolist() == [f"u{i}" if i % 3 else None for i in range(20)]
    assert columns["spent"].tolist() == [i * 0.5 for i in range(20)]


def test_rows_without_a_moment_count_from_now(tmp_path):
    recorder = Recorder(tmp_path, {}, flush_s=60)
    before_us = time.time_ns() // 1000
    given, _, made = batch(0)
    recorder.record(given, None, made)
    recorder.close()
    _, moments = columns_of(read_capture(tmp_path)[1])
    assert (moments >= before_us).all()
    assert (moments <= time.time_ns() // 1000).all()


def test_the_oldest_rows_go_when_the_folder_is_full(tmp_path):
    recorder = Recorder(tmp_path, {}, max_bytes=20_000, flush_s=60)
    for number in range(40):
        recorder.record(*batch(number * 10))
        recorder.flush()
    recorder.close()
    held = sum(file.stat().st_size for file in tmp_path.glob("*.parquet"))
    assert 0 < held <= 20_000
    _, moments = columns_of(read_capture(tmp_path)[1])
    assert moments.max() == 399
    assert moments.min() > 0


def test_many_small_files_are_joined_and_no_row_is_lost(tmp_path):
    recorder = Recorder(tmp_path, {"a": 1}, flush_s=60)
    for number in range(200):
        recorder.record(*batch(number * 10))
        recorder.flush()
    recorder.close()
    assert len(list(tmp_path.glob("*.parquet"))) < 100
    about, table = read_capture(tmp_path)
    assert about == {"a": 1}
    assert sorted(table[capture.MOMENT].to_pylist()) == list(range(2000))


def test_rows_that_come_too_fast_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "_WAITING_ROWS", 30)
    recorder = Recorder(tmp_path, {}, flush_s=60)
    for number in range(5):
        recorder.record(*batch(number * 10))
    recorder.close()
    assert recorder.dropped == 2
    assert read_capture(tmp_path)[1].num_rows == 30


def test_a_disk_that_refuses_loses_rows_and_raises_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    recorder = Recorder(tmp_path / "file", {}, flush_s=60)
    recorder.record(*batch(0))
    recorder.close()
    assert recorder.dropped == 1


def test_a_share_of_the_batches_is_captured(tmp_path):
    recorder = Recorder(tmp_path, {}, share=0.5, flush_s=60)
    recorder._chance.seed(1)
    for number in range(100):
        recorder.record(*batch(number))
    recorder.close()
    assert 250 < read_capture(tmp_path)[1].num_rows < 750
    with pytest.raises(ConfigError, match="share=0"):
        Recorder(tmp_path, {}, share=0.0)


def test_what_is_no_capture_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no captured rows in .*args\.features\.capture"):
        read_capture(tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="expected one"):
        read_capture(tmp_path)
