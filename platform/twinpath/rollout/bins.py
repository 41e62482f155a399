"""Bins of scores and of times. Fixed in advance, so that counts of different processes add up."""

import enum
from functools import lru_cache
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PROBABILITY_BINS = 64
_LABEL_BINS = 64
#: Bins of a call's time: 1 µs to 1,000 s, 16 in a decade, so edges are 15 % apart.
LATENCY_PER_DECADE = 16


class Scale(enum.StrEnum):
    """What scores are: any numbers, probabilities, reals over decades, values between given edges,
    or class labels."""

    ANY = "any"
    PROBABILITY = "probability"
    REAL = "real"
    EDGES = "edges"
    LABEL = "label"


class Bins(BaseModel):
    """How scores are binned.

    ``any``, the default: as probabilities between 0 and 1, by magnitude beyond, 8 bins to a
    decade. ``probability``: evenly in the logit, so that rare and sure scores are seen as well as
    the middle. ``real``: logarithmic in the magnitude, 16 to a decade, both signs (as DDSketch:
    Masson, Rim, Lee, VLDB 2019). ``edges``: adapted to a model, see :meth:`adapted`. ``label``:
    classes, by a hash. The last bin counts what is not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: Scale = Scale.ANY
    edges: tuple[float, ...] = Field((), max_length=128)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.scale is Scale.EDGES) != bool(self.edges):
            raise ValueError("edges go with scale 'edges', and only with it")
        if not all(np.isfinite(self.edges)) or list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges {self.edges}: expected finite, growing numbers")
        return self

    @property
    def count(self) -> int:
        """Number of bins, the one for what is not finite included."""
        return _LABEL_BINS + 1 if self.scale is Scale.LABEL else len(edges_of(self)) + 1

    def index(self, scores: NDArray[Any]) -> Ints:
        """The bin of each score; ``scores`` has shape (n,) and any numeric dtype, or holds
        labels where the scale is ``label``."""
        if self.scale is Scale.LABEL:
            return _label_bins(scores)
        return np.searchsorted(edges_of(self), scores, side="right")

    @classmethod
    def adapted(cls, scores: NDArray[Any], count: int = 48) -> Self:
        """Bins between quantiles of these scores: for a model whose scores are neither
        probabilities nor spread over decades. Rounded to six digits, so that a tag holds them."""
        finite = np.asarray(scores, np.float64)
        finite = finite[np.isfinite(finite)]
        quantiles = np.quantile(finite, np.linspace(0, 1, count)) if len(finite) else np.zeros(1)
        edges = sorted({float(f"{edge:.6g}") for edge in quantiles})
        return cls(scale=Scale.EDGES, edges=tuple(edges))


@lru_cache(maxsize=64)
def edges_of(bins: Bins) -> Floats:
    """Upper edges of all bins but the last, read-only. Infinity and NaN lie above all of them."""
    if bins.scale in (Scale.PROBABILITY, Scale.ANY):
        logits = np.linspace(-8, 8, _PROBABILITY_BINS - 1)
        edges = 1 / (1 + np.exp(-logits))
        if bins.scale is Scale.ANY:
            above, below = np.logspace(0, 6, 6 * 8 + 1), -np.logspace(6, -3, 9 * 8 + 1)
            edges = np.concatenate([below, edges, above])
    elif bins.scale is Scale.REAL:
        magnitudes = np.logspace(-6, 9, 15 * 16 + 1)
        edges = np.concatenate([-magnitudes[::-1], magnitudes])
    else:
        edges = np.array(bins.edges)
    edges = np.append(edges, np.finfo(np.float64).max)
    edges.flags.writeable = False
    return edges


def _label_bins(labels: NDArray[Any]) -> Ints:
    if labels.dtype.kind in "biu":
        return labels.astype(np.int64) % _LABEL_BINS
    digest = xxhash.xxh3_64_intdigest
    texts = (
        (_LABEL_BINS if _missing(v) else digest(str(v).encode()) % _LABEL_BINS)
        for v in labels.tolist()
    )
    return np.fromiter(texts, np.int64, len(labels))


def _missing(value: Any) -> bool:
    return value is None or value != value


LATENCY_EDGES_S: Floats = np.logspace(-6, 3, 9 * LATENCY_PER_DECADE + 1)
LATENCY_EDGES_S.flags.writeable = False
LATENCY_BINS = len(LATENCY_EDGES_S) + 1
