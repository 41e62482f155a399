"""How busy an engine is, as its scheduler says after each step."""

from typing import Any


class EngineLoad:
    """A stat logger for vLLM's engine that keeps the last figures.

    ``kv_use`` is the part of the KV cache's blocks that running sequences hold, 0 to 1; tokens of
    ``prefix_queries`` and ``prefix_hits`` are counted since the start.
    """

    def __init__(self) -> None:
        self.running = self.waiting = 0
        self.kv_use = 0.0
        self.prefix_queries = self.prefix_hits = 0

    def logger(self, vllm_config: Any = None, engine_index: int = 0) -> "EngineLoad":
        """vLLM's factory of stat loggers."""
        return self

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """vLLM's hook, after each step of the engine."""
        if scheduler_stats is None:
            return
        self.running = scheduler_stats.num_running_reqs
        self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        self.kv_use = scheduler_stats.kv_cache_usage
        prefix = scheduler_stats.prefix_cache_stats
        self.prefix_queries += prefix.queries
        self.prefix_hits += prefix.hits

    def log(self) -> None:
        """vLLM's hook; nothing is printed."""

    def log_engine_initialized(self) -> None:
        """vLLM's hook; nothing is printed."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """vLLM's hook; an engine that sleeps holds no sequences."""
