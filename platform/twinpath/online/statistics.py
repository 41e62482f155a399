"""Counters of a served model, in the terms of the Open Inference Protocol's statistics extension.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

import time
from dataclasses import dataclass, field
from typing import Any

from twinpath.online.batcher import Timing


@dataclass(slots=True)
class Duration:
    """How often something happened, and for how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """It happened again."""
        self.count += 1
        self.seconds += seconds

    def as_dict(self) -> dict[str, int]:
        """As the protocol writes it, in nanoseconds."""
        return {"count": self.count, "ns": int(self.seconds * 1e9)}


@dataclass(slots=True)
class Statistics:
    """What one replica has served since it started."""

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)
    _stages: tuple[Duration, ...] = ()

    def __post_init__(self) -> None:
        self._stages = (self.queue, self.compute_input, self.compute_infer, self.compute_output)

    def request(
        self,
        rows: int,
        timing: Timing | None,
        total_s: float,
        ok: bool,
        decode_s: float = 0.0,
        encode_s: float = 0.0,
    ) -> None:
        """A request was answered; ``timing`` is None when its rows were not run."""
        # Written out: seven calls of `Duration.add` would take as long as the rest of this.
        ended = self.success if ok else self.fail
        ended.count += 1
        ended.seconds += total_s
        if timing is None:
            return
        queue, into, run, out = self._stages
        self.inference_count += rows
        queue.count += 1
        queue.seconds += timing.queue_s
        into.count += 1
        into.seconds += decode_s
        run.count += 1
        run.seconds += timing.run_s
        out.count += 1
        out.seconds += encode_s

    def batch(self, timing: Timing) -> None:
        """A batch was run."""
        self.execution_count += 1
        self.last_inference_ms = int(time.time() * 1000)
        self.batches.setdefault(timing.batch_rows, Duration()).add(timing.run_s)

    def as_dict(self, name: str, version: str) -> dict[str, Any]:
        """``ModelStatistics`` of the protocol."""
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success.as_dict(),
                "fail": self.fail.as_dict(),
                "queue": self.queue.as_dict(),
                "compute_input": self.compute_input.as_dict(),
                "compute_infer": self.compute_infer.as_dict(),
                "compute_output": self.compute_output.as_dict(),
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": {"count": spent.count, "ns": 0},
                    "compute_infer": spent.as_dict(),
                    "compute_output": {"count": spent.count, "ns": 0},
                }
                for size, spent in sorted(self.batches.items())
            ],
        }
