"""Replicas on queue depth, as a pure function and through Serve's policy interface."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpath import Replicas
from twinpath.nodes.llm_load import EngineLoad
from twinpath.online.autoscaling import (
    KV_USE,
    LOAD,
    desired_replicas,
    queue_depth_policy,
    serve_scaling,
)


@pytest.mark.parametrize(
    ("load", "wanted"), [(0, 1), (1, 1), (4, 1), (4.5, 2), (5, 2), (8, 2), (9, 3), (1000, 3)]
)
def test_each_replica_gets_its_target_queue_within_the_bounds(load: float, wanted: int):
    assert desired_replicas(load, 4, 1, 3) == wanted


def test_no_load_needs_no_replica_and_one_row_needs_one():
    assert desired_replicas(0, 4, 0, 3) == 0
    assert desired_replicas(1, 4, 0, 3) == 1


@given(
    load=st.floats(0, 1e6),
    target=st.floats(0.1, 1e3),
    low=st.integers(0, 5),
    more=st.integers(0, 50),
)
def test_bounds_hold_and_more_load_never_means_fewer(
    load: float, target: float, low: int, more: int
):
    wanted = desired_replicas(load, target, low, low + more)
    assert low <= wanted <= low + more
    assert desired_replicas(load * 2, target, low, low + more) >= wanted
    assert wanted == low + more or math.ceil(load / target) <= wanted


def context(**given: Any) -> Any:
    found = {
        "aggregated_metrics": {},
        "total_queued_requests": 0.0,
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 10,
        "policy_state": {"kept": 1},
        "config": SimpleNamespace(get_target_ongoing_requests=lambda: 3.0),
    }
    return SimpleNamespace(**(found | given))


def test_rows_in_all_replicas_and_calls_at_handles_add_up():
    load = context(aggregated_metrics={LOAD: {"a": 3.0, "b": 4.0}}, total_queued_requests=2.0)
    assert queue_depth_policy(load) == (3, {"kept": 1})


@pytest.mark.parametrize(
    ("kv_use", "wanted"),
    [({"a": 0.5}, 1), ({"a": 0.9}, 2), ({"a": 0.9, "b": 0.95}, 3), ({"a": 0.2, "b": 0.2}, 1)],
)
def test_full_caches_ask_for_replicas_while_the_queue_is_short(kv_use: Any, wanted: int):
    load = context(aggregated_metrics={LOAD: {"a": 1.0}, KV_USE: kv_use})
    assert queue_depth_policy(load)[0] == wanted


def test_the_queue_and_the_caches_are_not_added_but_the_larger_demand_wins():
    load = context(aggregated_metrics={LOAD: {"a": 12.0}, KV_USE: {"a": 0.9, "b": 0.9}})
    assert queue_depth_policy(load)[0] == 4


@pytest.mark.parametrize("metrics", [None, {}, {LOAD: {}}, {LOAD: None}, {"other": {"a": 99.0}}])
def test_before_any_replica_has_reported_there_are_as_few_as_allowed(metrics: Any):
    load = context(aggregated_metrics=metrics, total_queued_requests=None, policy_state=None)
    assert queue_depth_policy(load) == (1, {})


def test_a_fixed_number_is_not_autoscaled():
    assert serve_scaling(Replicas(3, 3)) == {"num_replicas": 3}


def test_the_bounds_and_the_policy_reach_serve():
    pytest.importorskip("ray.serve")
    config = serve_scaling(Replicas(0, 4, target_queue=8, downscale_delay_s=5))[
        "autoscaling_config"
    ]
    assert (config.min_replicas, config.max_replicas) == (0, 4)
    assert config.downscale_delay_s == 5
    assert config.get_target_ongoing_requests() == 8


def test_the_policy_runs_as_the_controller_runs_it_and_adds_both_queues():
    pytest.importorskip("ray.serve")
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve.config import AutoscalingContext

    config = serve_scaling(Replicas(0, 9, target_queue=10, upscale_delay_s=0))["autoscaling_config"]
    policy = _resolve_policy_callable(config.policy)

    def context(reported: dict[str, float], queued: float) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=None, deployment_name="node", app_name="app", current_num_replicas=2,
            target_num_replicas=2, running_replicas=[], total_num_requests=queued,
            total_queued_requests=queued, aggregated_metrics={LOAD: reported}, raw_metrics={},
            capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=9, policy_state={},
            last_scale_up_time=None, last_scale_down_time=None, current_time=0.0, config=config,
        )  # fmt: skip

    assert policy(context({"a": 21.0, "b": 14.0}, 6.0))[0] == 5
    assert policy(context({}, 0.0))[0] == 0


def test_replicas_with_an_engine_report_its_sequences_and_the_use_of_its_cache():
    pytest.importorskip("ray.serve")
    from twinpath.online.replicas import Ingress, PlacedNode

    load = EngineLoad()
    load.kv_use = 0.25
    engine = SimpleNamespace(sequences=lambda: 40, load=load)
    batcher = SimpleNamespace(queued_rows=3, running_rows=2)
    report: Any = Ingress.record_autoscaling_stats
    assert report(SimpleNamespace(_batcher=batcher, _engine=engine)) == {LOAD: 43, KV_USE: 0.25}
    assert report(SimpleNamespace(_batcher=batcher, _engine=None)) == {LOAD: 5}
    report = PlacedNode.record_autoscaling_stats
    placed = SimpleNamespace(_batcher=batcher, _runner=SimpleNamespace(node=engine))
    assert report(placed) == {LOAD: 43, KV_USE: 0.25}
    placed = SimpleNamespace(_batcher=batcher, _runner=SimpleNamespace(node=object()))
    assert report(placed) == {LOAD: 5}
