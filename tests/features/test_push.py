"""Pushed rows: what is refused, what is written, and a store that is away for a while."""

import asyncio
import base64
import threading
import time
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pandas as pd
import pytest

from tests.features.conftest import Redis
from tests.features.shop import NOW
from tests.features.test_history import read, repository
from twinpath import FeatureSink
from twinpath.errors import (
    ConfigError,
    FeatureStoreError,
    ForbiddenError,
    InputError,
    OverloadedError,
)
from twinpath.features.push import Pusher
from twinpath.features.repo import FeatureRepo
from twinpath.features.writing import ViewWriter
from twinpath.graph.plan import Plan
from twinpath.online.app import graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.feature_args import PushArgs
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.keys import new_key, write_keys

pytestmark = pytest.mark.timeout(300)


def visit(**values) -> dict:
    at = {"event_timestamp": NOW.isoformat()}
    return {"user_id": "ann", "shop": 1, "visits": 5, "spent": 2.5} | at | values


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> FeatureRepo:
    return repository(tmp_path_factory.mktemp("push") / "shop")


@pytest.fixture
def pusher(repo):
    made = Pusher(repo)
    yield made
    assert made.close() == 0


def test_rows_of_every_type_are_read_back_by_feasts_client(repo, pusher):
    row = {
        "user_id": "bob", "event_timestamp": "2024-05-01T14:00:00+02:00", "f32": 1.5, "f64": 2,
        "i32": -3, "i64": 2**62 + 1, "flag": True, "text": "é",
        "blob": base64.b64encode(b"\x00\xff").decode(), "moment": "2024-04-30T10:00:00Z",
    }  # fmt: skip
    nulls = {name: None for name in row if name not in ("user_id", "event_timestamp")}
    rows = [row, nulls | {"user_id": "eve", "event_timestamp": NOW}]
    assert pusher.offer("types", pusher.check("types", rows)).result(60) == 2
    found = read(repo, "types", {"user_id": ["bob", "eve"]})
    assert found["i64"] == [2**62 + 1, None]
    assert found["f64"] == [2.0, None]
    assert found["blob"] == [b"\x00\xff", None]
    assert found["text"] == ["é", None]
    assert found["flag"] == [True, None]
    assert found["i64__ts"] == [int(NOW.replace(tzinfo=UTC).timestamp())] * 2


def test_an_older_row_that_comes_later_does_not_win(repo, pusher):
    older = (NOW - timedelta(hours=1)).isoformat()
    assert pusher.offer("visits", pusher.check("visits", [visit(visits=7)])).result(60) == 1
    late = pusher.check("visits", [visit(visits=6, event_timestamp=older)])
    assert pusher.offer("visits", late).result(60) == 0
    # Within one push too, whatever the order.
    both = [visit(shop=2, visits=2), visit(shop=2, visits=1, event_timestamp=older)]
    pusher.offer("visits", pusher.check("visits", both)).result(60)
    found = read(repo, "visits", {"user_id": ["ann", "ann"], "shop": [1, 2]})
    assert found["visits"] == [7, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visits": "5"}, r"row 1, column 'visits': '5' is no Int64"),
        ({"visits": 2**63}, r"row 1, column 'visits'.*is no Int64"),
        ({"visits": True}, r"row 1, column 'visits': True is no Int64"),
        ({"spent": "much"}, r"row 1, column 'spent'"),
        ({"user_id": 7}, r"row 1, column 'user_id': 7 is no String"),
        ({"user_id": None}, r"row 1: the key 'user_id' is null"),
        ({"vists": 5}, r"row 1: view 'visits' has no column 'vists'\. Did you mean 'visits'"),
        ({"event_timestamp": "yesterday"}, r"row 1.*expected ISO 8601"),
        ({"event_timestamp": "2999-01-01"}, r"row 1.*in the future"),
    ],
)
def test_a_row_that_does_not_fit_the_view_refuses_all_and_is_named(pusher, change, says):
    with pytest.raises(InputError, match=says):
        pusher.check("visits", [visit(), visit(**change)])


def test_a_row_must_have_every_feature_and_a_push_must_have_a_row(pusher):
    row = visit()
    del row["spent"]
    with pytest.raises(InputError, match=r"row 0 of view 'visits' lacks 'spent'"):
        pusher.check("visits", [row])
    with pytest.raises(InputError, match="no rows"):
        pusher.check("visits", [])
    with pytest.raises(InputError, match="row 0: expected an object"):
        pusher.check("visits", [7])
    with pytest.raises(ConfigError, match=r"no view 'visit'.*Did you mean 'visits'"):
        pusher.check("visit", [visit()])


def test_nothing_is_lost_while_the_store_is_away_and_too_much_is_refused(tmp_path):
    redis = Redis(tmp_path)
    redis.start()
    try:
        store = f'{{type: redis, connection_string: "{redis.address}"}}'
        repo = repository(tmp_path / "away", store)
        pusher = Pusher(repo, max_rows=50, longest_wait_s=0.2)
        first = pusher.offer("visits", pusher.check("visits", [visit(shop=0)]))
        assert first.result(60) == 1
        redis.kill()
        waiting = [
            pusher.offer("visits", pusher.check("visits", [visit(shop=n, visits=n)]))
            for n in range(1, 51)
        ]
        end_s = time.monotonic() + 60
        while not pusher.statistics.failures:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        with pytest.raises(OverloadedError, match="50 pushed rows wait") as refused:
            pusher.offer("visits", pusher.check("visits", [visit(shop=99)]))
        assert refused.value.retry_after_s > 0
        assert not any(each.done() for each in waiting)
        redis.start()
        assert [each.result(60) for each in waiting] == [1] * 50
        assert pusher.waiting_rows == 0
        keys = {"user_id": ["ann"] * 51, "shop": list(range(51))}
        assert read(repo, "visits", keys)["visits"] == [5, *range(1, 51)]
        assert pusher.statistics.accepted == pusher.statistics.written == 51
        assert pusher.close() == 0
        with pytest.raises(FeatureStoreError, match="stopping"):
            pusher.offer("visits", [])
    finally:
        redis.kill()


def test_nothing_accepted_is_lost_when_the_store_dies_under_load(tmp_path):
    redis = Redis(tmp_path)
    redis.start()
    try:
        store = f'{{type: redis, connection_string: "{redis.address}"}}'
        repo = repository(tmp_path / "load", store)
        pusher = Pusher(repo, max_rows=100_000, longest_wait_s=0.2)
        pushes, stop = [], threading.Event()

        def push() -> None:
            while not stop.is_set():
                row = visit(shop=len(pushes), visits=len(pushes))
                pushes.append(pusher.offer("visits", pusher.check("visits", [row])))
                time.sleep(0.002)

        thread = threading.Thread(target=push, daemon=True)
        thread.start()
        for _ in range(3):
            begun = len(pushes)
            until(lambda begun=begun: len(pushes) > begun + 20 and pushes[begun + 10].done())
            redis.kill()  # writes are under way
            gone = len(pushes)
            until(lambda gone=gone: len(pushes) > gone + 20)
            assert not pushes[-1].done()
            redis.start()
        stop.set()
        thread.join()
        assert [each.result(60) for each in pushes] == [1] * len(pushes)
        count = len(pushes)
        keys = {"user_id": ["ann"] * count, "shop": list(range(count))}
        assert read(repo, "visits", keys)["visits"] == list(range(count))
        assert pusher.close() == 0
    finally:
        redis.kill()


def until(condition) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_each_push_is_told_of_its_own_rows(repo, monkeypatch):
    pusher = Pusher(repo)
    older = (NOW - timedelta(hours=1)).isoformat()
    old, new = visit(shop=71, event_timestamp=older), visit(shop=71)
    first = pusher.offer("visits", pusher.check("visits", [new]))
    assert first.result(60) == 1
    # Both wait for the same write.
    gate = threading.Event()
    write = ViewWriter.write_each
    monkeypatch.setattr(ViewWriter, "write_each", lambda *args: gate.wait(60) and write(*args))
    before = pusher.offer("visits", pusher.check("visits", [visit(shop=72)]))
    outdated = pusher.offer("visits", pusher.check("visits", [old]))
    fresh = pusher.offer("visits", pusher.check("visits", [visit(shop=73), visit(shop=74)]))
    gate.set()
    assert [each.result(60) for each in (before, outdated, fresh)] == [1, 0, 2]
    assert pusher.close() == 0


def test_a_view_that_cannot_be_written_holds_no_other_up(repo, monkeypatch):
    pusher = Pusher(repo, longest_wait_s=0.1)
    write = ViewWriter.write_each
    broken = threading.Event()
    broken.set()

    def writes(self, rows, progress=None):
        if self.view.name == "visits" and broken.is_set():
            raise RuntimeError("no such table")
        return write(self, rows, progress)

    monkeypatch.setattr(ViewWriter, "write_each", writes)
    stuck = [pusher.offer("visits", pusher.check("visits", [visit(shop=n)])) for n in (81, 82)]
    row = dict.fromkeys(("f32", "f64", "i32", "i64", "flag", "text", "blob", "moment"))
    row |= {"user_id": "tom", "event_timestamp": NOW}
    other = pusher.offer("types", pusher.check("types", [row]))
    assert other.result(60) == 1
    assert not any(each.done() for each in stuck)
    broken.clear()
    assert [each.result(60) for each in stuck] == [1, 1]
    assert pusher.close() == 0


def test_what_cannot_be_written_before_the_end_is_counted_and_told(tmp_path):
    redis = Redis(tmp_path)
    redis.start()
    try:
        store = f'{{type: redis, connection_string: "{redis.address}"}}'
        pusher = Pusher(repository(tmp_path / "gone", store), longest_wait_s=0.1)
        rows = pusher.check("visits", [visit(), visit(shop=2)])
        redis.kill()
        future = pusher.offer("visits", rows)
        assert pusher.close(timeout_s=0.5) == 2
        with pytest.raises(FeatureStoreError, match="stopped before"):
            future.result(5)
    finally:
        redis.kill()


async def asked(plan: Plan, calls, *, push=None, gateway=None, max_body_bytes=10_000):
    """What the served app answers to (headers, JSON or bytes) in turn."""
    from twinpath.graph.stage import Executor

    batcher = Batcher(Executor(plan).run, plan.placement.batch)
    app = graph_app(
        plan, batcher, max_body_bytes=max_body_bytes, push=push or PushArgs(), gateway=gateway
    )
    transport = httpx.ASGITransport(app)
    answers = []
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for headers, body in calls:
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            answers.append(await client.post("/features/push", headers=headers, **given))
    await asyncio.sleep(0)
    return answers


def plan_of(repo) -> Plan:
    from tests.features.test_lookup import visits

    return visits(repo).plan


async def test_the_endpoint_takes_rows_from_callers_who_may(repo, tmp_path):
    keys = tmp_path / "keys"
    may, first = new_key("ann", ("visits", "features:push"))
    may_not, second = new_key("ben", ("visits",))
    write_keys(keys, [first, second])
    gateway = GatewayArgs(api_keys=keys)
    body = {"view": "visits", "rows": [visit(user_id="web")], "wait": True}
    answers = await asked(
        plan_of(repo),
        [({"x-api-key": may}, body), ({"x-api-key": may_not}, body), ({}, body)],
        gateway=gateway,
        push=PushArgs(max_wait_s=60),
    )
    assert [answer.status_code for answer in answers] == [200, 403, 401]
    assert answers[0].json() == {"accepted": 1, "written": 1}
    assert "features:push" in answers[1].json()["error"]["message"]
    found = read(repo, "visits", {"user_id": ["web"], "shop": [1]})
    assert found["visits"] == [5]


async def test_where_nobody_is_known_pushing_has_to_be_opened(repo):
    body = {"view": "visits", "rows": [visit(user_id="open")]}
    [closed] = await asked(plan_of(repo), [({}, body)], gateway=GatewayArgs())
    assert closed.status_code == ForbiddenError.http_status
    assert "callers: anyone" in closed.json()["error"]["message"]
    [opened] = await asked(
        plan_of(repo), [({}, body)], gateway=GatewayArgs(), push=PushArgs(callers="anyone")
    )
    assert (opened.status_code, opened.json()) == (202, {"accepted": 1})


async def test_bodies_that_are_wrong_say_why(repo):
    good = {"view": "visits", "rows": [visit()]}
    bodies = [
        (b"", 400, "no body"),
        (b"{", 400, "no JSON"),
        ({"view": "visits"}, 400, "rows"),
        ({**good, "wiat": True}, 400, "wait"),
        ({**good, "view": "visit"}, 422, "Did you mean 'visits'"),
        ({**good, "rows": [visit(visits="x")]}, 422, "column 'visits'"),
        ({**good, "rows": [visit()] * 200}, 413, "push fewer rows"),
    ]
    calls = [({}, body) for body, _, _ in bodies]
    answers = await asked(plan_of(repo), calls, push=PushArgs(callers="anyone"))
    for answer, (_, status, says) in zip(answers, bodies, strict=True):
        assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True)


async def test_a_full_queue_is_503_with_retry_after_and_what_never_fits_is_413(repo, monkeypatch):
    gate = threading.Event()
    write = ViewWriter.write_each
    monkeypatch.setattr(ViewWriter, "write_each", lambda *args: gate.wait(60) and write(*args))
    threading.Timer(3, gate.set).start()
    first = {"view": "visits", "rows": [visit(shop=91)], "wait": False}
    second = {"view": "visits", "rows": [visit(shop=92)]}
    both = {"view": "visits", "rows": [visit(shop=93), visit(shop=94)]}
    push = PushArgs(callers="anyone", max_waiting_rows=1)
    calls = [({}, body) for body in (first, second, both)]
    accepted, full, never = await asked(plan_of(repo), calls, push=push)
    assert accepted.status_code == 202
    assert full.status_code == 503
    assert full.json()["error"]["code"] == "overloaded"
    assert int(full.headers["retry-after"]) >= 1
    assert never.status_code == 413
    assert "push fewer rows at a time" in never.json()["error"]["message"]


def test_a_folder_of_scored_rows_becomes_features(repo, tmp_path):
    (tmp_path / "scored").mkdir()
    frame = pd.DataFrame(
        {"who": ["job-1", "job-2"], "shop": [1, 2], "visits": [3, 4], "p": [0.25, np.nan]}
    )
    frame.to_parquet(tmp_path / "scored" / "a.parquet")
    sink = FeatureSink("visits", repo, {"user_id": "who", "spent": "p"})
    sink.check(frame.columns)
    before_s = datetime.now(UTC).timestamp()
    assert sink.write(tmp_path / "scored") == 2
    assert sink.write(tmp_path / "scored") == 2
    found = read(repo, "visits", {"user_id": ["job-1", "job-2"], "shop": [1, 2]})
    assert (found["visits"], found["spent"]) == ([3, 4], [0.25, None])
    assert found["visits__ts"][0] >= int(before_s)
    with pytest.raises(ConfigError, match=r"needs 'user_id'.*no column 'user_id'"):
        FeatureSink("visits", repo).check(frame.columns)
