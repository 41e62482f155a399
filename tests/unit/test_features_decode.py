"""Stored values become arrays, whatever is null among them."""

import struct

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from twinpath.features.decode import NEVER, column, columns_of, timestamps


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def stored(value, kind: str) -> bytes:
    """A serialized Value by the protobuf specification; feast.types.Value.proto has the tags."""
    if kind == "float32":
        return b"\x35" + struct.pack("<f", value)
    if kind == "float64":
        return b"\x29" + struct.pack("<d", value)
    if kind == "str":
        text = value.encode()
        return b"\x12" + varint(len(text)) + text
    tags = {"int32": b"\x18", "int64": b"\x20", "bool": b"\x38", "datetime64[us]": b"\x40"}
    return tags[kind] + varint(int(value))


NULLS = st.sampled_from([None, b"", b"\x98\x01\x00"])
NUMBERS = {
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "bool": st.booleans(),
}


@pytest.mark.parametrize("kind", NUMBERS)
@given(data=st.data())
def test_numbers_and_nulls_come_back_exactly(kind, data):
    cells = data.draw(st.lists(NUMBERS[kind] | NULLS, max_size=20))
    is_null = [cell is None or isinstance(cell, bytes) for cell in cells]
    raw = [c if null else stored(c, kind) for c, null in zip(cells, is_null, strict=True)]
    values, nulls = column(raw, kind)
    assert values.dtype == np.dtype(kind)
    if kind.startswith("float"):
        assert nulls is None
        assert np.isnan(values).tolist() == is_null
    else:
        assert (nulls.tolist() if nulls is not None else [False] * len(raw)) == is_null
    kept = [v for v, null in zip(values.tolist(), is_null, strict=True) if not null]
    assert kept == [c for c, null in zip(cells, is_null, strict=True) if not null]


@given(st.lists(st.text(max_size=126) | NULLS, max_size=12))
def test_texts_come_back(cells):
    cells = [
        cell if not isinstance(cell, str) or len(cell.encode()) < 128 else "x" for cell in cells
    ]
    raw = [stored(c, "str") if isinstance(c, str) else c for c in cells]
    values, _ = column(raw, "str")
    assert values.tolist() == [c if isinstance(c, str) else None for c in cells]


def test_moments_are_microseconds_and_null_is_not_a_time():
    values, nulls = column([stored(1_700_000_000, "datetime64[us]"), None], "datetime64[us]")
    assert values.dtype == np.dtype("datetime64[us]")
    assert values[0] == np.datetime64("2023-11-14T22:13:20")
    assert np.isnat(values[1])
    assert nulls is None


def test_event_timestamps_are_read_at_once_or_one_by_one_with_the_same_result():
    whole = [b"\x08" + varint(s) for s in (1_385_000_000, 1_700_000_000)]
    assert timestamps(whole).tolist() == [1_385_000_000_000_000, 1_700_000_000_000_000]
    assert timestamps([]).tolist() == []
    early = b"\x08" + varint(7)
    with_nanos = whole[0] + b"\x10" + varint(250_000_000)
    assert timestamps([*whole, None, early, with_nanos]).tolist() == [
        1_385_000_000_000_000, 1_700_000_000_000_000, NEVER, 7_000_000, 1_385_000_000_250_000,
    ]  # fmt: skip


@given(
    st.lists(
        st.none()
        | st.tuples(
            st.integers(-62_135_596_800, 253_402_300_799) | st.integers(1 << 28, 1 << 35),
            st.integers(0, 999_999_999) | st.just(0),
        ),
        max_size=8,
    )
)
def test_every_moment_is_read_as_protobuf_writes_it(moments):
    raw = [None if m is None else Timestamp(seconds=m[0], nanos=m[1]) for m in moments]
    expected = [NEVER if m is None else m[0] * 1_000_000 + m[1] // 1000 for m in moments]
    stored = [None if m is None else m.SerializeToString() for m in raw]  # the epoch: no bytes
    assert timestamps(stored).tolist() == expected


def test_another_type_than_the_views_is_read_all_the_same():
    raw = [stored(2.5, "float64"), None, stored(3, "int64")]
    values, _ = column(raw, "float32")
    assert values.dtype == np.float32
    assert values[0] == 2.5
    assert np.isnan(values[1])
    assert values[2] == 3


@given(data=st.data())
def test_features_side_by_side_are_as_each_by_itself(data):
    kinds = data.draw(st.lists(st.sampled_from(sorted(NUMBERS)), min_size=1, max_size=6))
    cell = [st.one_of(NUMBERS[kind].map(lambda v, k=kind: stored(v, k)), NULLS) for kind in kinds]
    rows = data.draw(st.lists(st.tuples(st.just(b"before"), *cell, st.just(b"after")), max_size=8))
    found = columns_of(rows, 1, kinds)
    for at, (kind, (values, nulls)) in enumerate(zip(kinds, found, strict=True), 1):
        alone, alone_nulls = column([row[at] for row in rows], kind)
        np.testing.assert_array_equal(values, alone)
        np.testing.assert_array_equal(nulls, alone_nulls)
        assert values.dtype == alone.dtype
        assert values.flags.c_contiguous
        assert values.flags.aligned
        assert values.flags.writeable


def test_a_float_of_another_type_among_floats_is_read_by_its_type():
    rows = [(stored(1.5, "float64"), stored(2, "int64")), (stored(0.5, "float64"), None)]
    (first, _), (second, _) = columns_of(rows, 0, ("float64", "float64"))
    assert first.tolist() == [1.5, 0.5]
    assert second[0] == 2.0
    assert np.isnan(second[1])
