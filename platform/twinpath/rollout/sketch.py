"""What is counted of each version: scores, errors and times, overall and per segment value.

All are counts in fixed bins, so merging is addition: associative, commutative, lossless. Sketches
of replicas, seconds and machines add up in any order.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import InputError
from twinpath.rollout.bins import LATENCY_BINS, Bins

Counts = NDArray[np.int64]

#: Values of a segment column beyond those that a recorder keeps apart.
OTHER = "(other)"


@dataclass(slots=True)
class Tally:
    """Rows of one version, in one segment or overall.

    ``scores`` has shape (bins.count,): rows by the bin of their score. A failed row has none, so
    rows = scores.sum() + errors.
    """

    scores: Counts
    errors: int = 0

    @classmethod
    def empty(cls, bins: Bins) -> Self:
        """No rows yet."""
        return cls(np.zeros(bins.count, np.int64))

    @property
    def rows(self) -> int:
        """Rows that were to be scored."""
        return int(self.scores.sum()) + self.errors

    @property
    def outcomes(self) -> Counts:
        """Shape (bins.count + 1,): the scores' bins, then the failed rows."""
        return np.append(self.scores, self.errors)

    def add(self, other: "Tally") -> None:
        """Count the other's rows as well."""
        self.scores = self.scores + other.scores
        self.errors += other.errors

    def copy(self) -> "Tally":
        """One that can be added to without changing this."""
        return Tally(self.scores.copy(), self.errors)


@dataclass(slots=True)
class Sketch:
    """One version: its rows overall and by segment column and value, and its calls by time.

    ``latency`` has shape (LATENCY_BINS,): calls of the model by how long they took.
    """

    overall: Tally
    latency: Counts = field(default_factory=lambda: np.zeros(LATENCY_BINS, np.int64))
    segments: dict[str, dict[str, Tally]] = field(default_factory=dict)

    @classmethod
    def empty(cls, bins: Bins) -> Self:
        """Nothing counted yet."""
        return cls(Tally.empty(bins))

    def add(self, other: "Sketch") -> None:
        """Count the other's rows and calls as well."""
        self.overall.add(other.overall)
        self.latency = self.latency + other.latency
        for column, values in other.segments.items():
            mine = self.segments.setdefault(column, {})
            for value, tally in values.items():
                if value in mine:
                    mine[value].add(tally)
                else:
                    mine[value] = tally.copy()


@dataclass(slots=True)
class Report:
    """What was counted since the last report, by version. ``bins`` says what the bins mean."""

    bins: Bins
    versions: dict[str, Sketch] = field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Count the other's versions as well.

        Raises InputError when its scores are binned in another way.
        """
        if other.bins != self.bins:
            raise InputError(
                f"a report with bins {other.bins} does not add to one with {self.bins}: "
                "all recorders of a rollout take the bins of its state"
            )
        for version, sketch in other.versions.items():
            self.versions.setdefault(version, Sketch.empty(self.bins)).add(sketch)

    def to_json(self) -> str:
        """JSON text; empty bins are left out, so it grows with what was seen."""
        return json.dumps(
            {
                "bins": self.bins.model_dump(mode="json", exclude_defaults=True),
                "versions": {name: _sketch_out(one) for name, one in self.versions.items()},
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` wrote. Raises InputError for anything else."""
        try:
            found = json.loads(text)
            bins = Bins.model_validate(found["bins"])
            versions = {name: _sketch_in(one, bins) for name, one in found["versions"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"not a report of scores: {error!r}") from None
        return cls(bins, versions)


def merged(reports: Iterable[Report], bins: Bins) -> Report:
    """The sum of reports; an empty report with these bins for none."""
    total = Report(bins)
    for report in reports:
        total.add(report)
    return total


def _sparse(counts: Counts) -> list[list[int]]:
    at = np.flatnonzero(counts)
    return [at.tolist(), counts[at].tolist()]


def _dense(pair: list[list[int]], size: int) -> Counts:
    counts = np.zeros(size, np.int64)
    counts[np.array(pair[0], np.int64)] = np.array(pair[1], np.int64)
    return counts


def _tally_out(tally: Tally) -> list[Any]:
    return [*_sparse(tally.scores), tally.errors]


def _tally_in(found: list[Any], bins: Bins) -> Tally:
    return Tally(_dense(found[:2], bins.count), int(found[2]))


def _sketch_out(sketch: Sketch) -> dict[str, Any]:
    return {
        "overall": _tally_out(sketch.overall),
        "latency": _sparse(sketch.latency),
        "segments": {
            column: {value: _tally_out(tally) for value, tally in values.items()}
            for column, values in sketch.segments.items()
        },
    }


def _sketch_in(found: dict[str, Any], bins: Bins) -> Sketch:
    return Sketch(
        _tally_in(found["overall"], bins),
        _dense(found["latency"], LATENCY_BINS),
        {
            column: {value: _tally_in(tally, bins) for value, tally in values.items()}
            for column, values in found["segments"].items()
        },
    )
