"""The gateway's rules, each with what it lets in and what it refuses."""

import asyncio
import contextlib
import datetime as dt
import http.server
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from twinpath import Batch, Columns, Graph, Node
from twinpath.errors import (
    AccessError,
    BodyTooLargeError,
    ConfigError,
    ForbiddenError,
    LimitError,
    MalformedBodyError,
    QuotaError,
    TwinpathError,
)
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import Ask
from twinpath.online.gateway import keys as keys_module
from twinpath.online.gateway.args import GatewayArgs, JwtArgs
from twinpath.online.gateway.audit import AuditLog
from twinpath.online.gateway.authentication import Authentication
from twinpath.online.gateway.build import build, refuse_public
from twinpath.online.gateway.keys import ApiKeys, new_key, read_keys, replace_key, write_keys
from twinpath.online.gateway.limiting import Limit
from twinpath.online.gateway.rules import Gateway
from twinpath.online.gateway.tokens import PUSH_SCOPE, Tokens
from twinpath.online.gateway.wishes import Deadlines, MaxRows, Priorities
from twinpath.online.oip_service import OipService
from twinpath.online.policy import Priority
from twinpath.online.protocols import oip_pb2 as pb

NOW = dt.datetime.now(dt.UTC)


def ask(graph: str = "numbers", **headers: str) -> Ask:
    named = {name.replace("_", "-").encode(): text.encode() for name, text in headers.items()}
    return Ask(graph, named)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def never_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at for changes at every request."""
    monkeypatch.setattr(keys_module, "CHECK_S", -1.0)


# API keys


def test_a_key_opens_the_graphs_of_its_scope_and_no_other(tmp_path: Path):
    key, record = new_key("ann", ("numbers",), "low")
    write_keys(tmp_path / "keys", [record])
    rule = Authentication([ApiKeys(tmp_path / "keys")])
    for headers in (bearer(key), {"x_api_key": key}):
        seen = ask(**headers)
        assert rule.admit(seen) is None
        assert (seen.principal, seen.max_priority) == ("ann", Priority.LOW)
    with pytest.raises(ForbiddenError, match="'ann' may not use graph 'letters'"):
        rule.admit(ask("letters", **bearer(key)))


def test_only_a_key_with_that_scope_opens_the_admin_api(tmp_path: Path):
    keys = [new_key("ann"), new_key("root", admin=True)]
    write_keys(tmp_path / "keys", [record for _, record in keys])
    rule = Authentication([ApiKeys(tmp_path / "keys")])
    for (key, _), wanted in zip(keys, (False, True), strict=True):
        seen = ask(**bearer(key))
        rule.admit(seen)
        assert seen.admin is wanted
    assert not ask().admin, "nor does anybody who was not asked who they are"
    _, replaced = replace_key(read_keys(tmp_path / "keys"), keys[1][1].id, NOW)
    assert [record.admin for record in replaced] == [False, True, True]


def test_a_key_is_not_in_its_file_and_only_its_owner_may_read_that(tmp_path: Path):
    key, record = new_key("ann")
    write_keys(tmp_path / "keys", [record])
    secret = key.split("_", 2)[2]  # which may have underscores itself
    assert secret not in (tmp_path / "keys").read_text()
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("wrong", ["tp_", "tp_none_x", "tp_{id}_wrong", "tp_{id}_", "other"])
def test_any_other_key_is_refused(tmp_path: Path, wrong: str):
    _, record = new_key("ann")
    write_keys(tmp_path / "keys", [record])
    rule = Authentication([ApiKeys(tmp_path / "keys")])
    with pytest.raises(AccessError, match=r"not known|no kind"):
        rule.admit(ask(x_api_key=wrong.format(id=record.id)))
    with pytest.raises(AccessError, match="no credentials"):
        rule.admit(ask())


def test_a_key_ends_when_it_expires(tmp_path: Path):
    old, gone = new_key("ann", expires=NOW - dt.timedelta(seconds=1))
    new, stays = new_key("ben", expires=NOW + dt.timedelta(hours=1))
    write_keys(tmp_path / "keys", [gone, stays])
    rule = Authentication([ApiKeys(tmp_path / "keys")])
    rule.admit(ask(**bearer(new)))
    for _ in range(2):
        with pytest.raises(AccessError, match="expired"):
            rule.admit(ask(**bearer(old)))


@pytest.mark.usefixtures("never_old")
def test_keys_rotate_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "keys"
    (old, first), (new, second) = new_key("ann"), new_key("ann")
    write_keys(path, [first])
    rule = Authentication([ApiKeys(path)])
    rule.admit(ask(**bearer(old)))
    write_keys(path, [first, second])
    rule.admit(ask(**bearer(old)))
    rule.admit(ask(**bearer(new)))
    write_keys(path, [second])
    with pytest.raises(AccessError):
        rule.admit(ask(**bearer(old)))
    path.write_text("{broken")
    rule.admit(ask(**bearer(new)))
    assert "line 1" in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "line 1"), ('\n{"id": "abcd"}', "line 2"), ('{"id": "?"}', "line 1: id")],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, text: str, says: str):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "nowhere")


# JWTs


class Issuer:
    """An identity provider with keys that rotate."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.rotate("one")

    def rotate(self, kid: str) -> None:
        self.keys[kid] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def jwks(self) -> dict[str, Any]:
        public = jwt.algorithms.RSAAlgorithm.to_jwk
        return {
            "keys": [
                json.loads(public(key.public_key())) | {"kid": kid, "use": "sig", "alg": "RS256"}
                for kid, key in self.keys.items()
            ]
        }

    def token(self, kid: str = "one", **claims: Any) -> str:
        whole = {
            "sub": "ann", "aud": "twinpath", "iss": "me", "scope": "graph:numbers other",
            "exp": time.time() + 60,
        } | claims  # fmt: skip
        kept = {name: value for name, value in whole.items() if value is not None}
        return jwt.encode(kept, self.keys[kid], "RS256", {"kid": kid})


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


def by_file(signer: Issuer, tmp_path: Path, **more: Any) -> Authentication:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(signer.jwks()))
    return Authentication([Tokens(JwtArgs(jwks_file=path, audience="twinpath", **more))])


def test_a_token_opens_the_graphs_of_its_scope(issuer: Issuer, tmp_path: Path):
    rule = by_file(issuer, tmp_path, issuer="me")
    for _ in range(2):
        seen = ask(**bearer(issuer.token()))
        rule.admit(seen)
        assert seen.principal == "ann"
    with pytest.raises(ForbiddenError):
        rule.admit(ask("letters", **bearer(issuer.token())))
    rule.admit(ask("letters", **bearer(issuer.token(scope="graph:*"))))


def test_a_token_may_push_features_by_its_scope(issuer: Issuer, tmp_path: Path):
    for scope, wanted in (("graph:*", False), ("graph:numbers features:push", True)):
        seen = ask(**bearer(issuer.token(scope=scope)))
        by_file(issuer, tmp_path).admit(seen)
        assert (PUSH_SCOPE in seen.scopes) is wanted


def test_a_token_opens_the_admin_api_by_its_scope(issuer: Issuer, tmp_path: Path):
    for scope, wanted in (("graph:*", False), ("graph:* admin", True)):
        seen = ask(**bearer(issuer.token(scope=scope)))
        by_file(issuer, tmp_path).admit(seen)
        assert seen.admin is wanted
    seen = ask(**bearer(issuer.token(scope="graph:* admin")))
    by_file(issuer, tmp_path, admin_scope=None).admit(seen)
    assert not seen.admin


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"aud": "other"}, "Audience"),
        ({"iss": "other"}, "issuer"),
        ({"exp": 1}, "expired"),
        ({"exp": None}, "exp"),
        ({"sub": None}, "sub"),
    ],
)
def test_a_token_for_others_is_refused(
    issuer: Issuer, tmp_path: Path, claims: dict[str, Any], says: str
):
    rule = by_file(issuer, tmp_path, issuer="me")
    with pytest.raises(AccessError, match=says):
        rule.admit(ask(**bearer(issuer.token(**claims))))


def test_a_token_that_was_let_in_ends_with_its_time(issuer: Issuer, tmp_path: Path):
    rule = by_file(issuer, tmp_path, leeway_s=0)
    token = issuer.token(exp=time.time() + 1.2)
    rule.admit(ask(**bearer(token)))
    time.sleep(1.4)
    with pytest.raises(AccessError, match="expired"):
        rule.admit(ask(**bearer(token)))


def test_forged_tokens_are_refused(issuer: Issuer, tmp_path: Path):
    rule = by_file(issuer, tmp_path)
    claims = {"sub": "eve", "aud": "twinpath", "exp": time.time() + 60, "scope": "graph:*"}
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    unsigned = jwt.encode(claims, None, "none", {"kid": "one"})
    symmetric = jwt.encode(claims, "x" * 32, "HS256", {"kid": "one"})
    foreign = jwt.encode(claims, other, "RS256", {"kid": "one"})
    unknown = jwt.encode(claims, other, "RS256", {"kid": "two"})
    for token in (unsigned, symmetric, foreign, unknown, "a.b.c", ".."):
        with pytest.raises(AccessError):
            rule.admit(ask(**bearer(token)))


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_settings_that_would_accept_forgeries_are_refused(algorithm: str):
    with pytest.raises(ValidationError, match="only asymmetric"):
        JwtArgs(jwks_url="https://x", audience="a", algorithms=(algorithm,))
    with pytest.raises(ValidationError, match="one of jwks_file and jwks_url"):
        JwtArgs(audience="a")


@pytest.fixture
def provider(issuer: Issuer) -> Iterator[tuple[str, Callable[[], int]]]:
    """The issuer's keys over HTTP, and how often they were fetched."""
    fetched = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal fetched
            fetched += 1
            body = json.dumps(issuer.jwks()).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/jwks", lambda: fetched
    server.shutdown()


async def test_keys_come_from_a_url_once_and_again_for_a_new_one(
    issuer: Issuer, provider: tuple[str, Callable[[], int]], monkeypatch: pytest.MonkeyPatch
):
    url, fetched = provider
    rule = Authentication([Tokens(JwtArgs(jwks_url=url, audience="twinpath"))])

    async def admit(token: str) -> None:
        pending = rule.admit(ask(**bearer(token)))
        if pending is not None:
            await pending

    await asyncio.gather(*(admit(issuer.token()) for _ in range(10)))
    assert fetched() == 1
    issuer.rotate("two")
    with pytest.raises(AccessError, match="does not publish"):
        await admit(issuer.token("two"))  # unknown keys cannot make us fetch all the time
    monkeypatch.setattr("twinpath.online.gateway.tokens._FETCH_PAUSE_S", -1.0)
    await admit(issuer.token("two"))
    assert fetched() == 2
    del issuer.keys["two"]


# limits, sizes, wishes


def test_a_caller_has_its_rate_and_others_theirs():
    rule = Limit("3/minute")
    ann, ben = ask(), ask()
    ann.principal, ben.principal = "ann", "ben"
    for _ in range(3):
        rule.admit(ann)
    with pytest.raises(LimitError, match="3/minute") as refused:
        rule.admit(ann)
    assert 1 <= refused.value.retry_after_s <= 60
    assert refused.value.http_status == 429
    rule.admit(ben)


def test_a_quota_is_its_own_error_and_replicas_share_it():
    rule = Limit("6/day", quota=True, replicas=3)
    for _ in range(2):
        rule.admit(ask())
    with pytest.raises(QuotaError, match="6/day"):
        rule.admit(ask())


@pytest.mark.parametrize("text", ["many", "3/fortnight", "-1/second"])
def test_a_limit_that_cannot_be_read_is_refused(text: str):
    with pytest.raises(ValidationError):
        GatewayArgs.model_validate({"limits": {"rate": text}})


def test_a_deadline_is_kept_and_never_put_off():
    seen = ask(x_request_timeout_ms="250")
    Deadlines().admit(seen)
    assert seen.deadline_s is not None
    assert 0.2 < seen.deadline_s - time.monotonic() <= 0.25
    sooner = seen.deadline_s - 0.1
    seen.deadline_s = sooner
    Deadlines().admit(seen)
    assert seen.deadline_s == sooner


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1e3", "", "9" * 20, "NaN"])
def test_a_deadline_that_is_no_number_is_refused(text: str):
    with pytest.raises(MalformedBodyError, match="positive number of milliseconds"):
        Deadlines().admit(ask(x_request_timeout_ms=text))


def test_nobody_is_more_urgent_than_allowed():
    seen = ask(x_request_priority="High")
    seen.max_priority = Priority.NORMAL
    Priorities().admit(seen)
    assert seen.priority is Priority.NORMAL
    low = ask(x_request_priority="low")
    Priorities().admit(low)
    assert low.priority is Priority.LOW
    with pytest.raises(MalformedBodyError, match="low, normal or high"):
        Priorities().admit(ask(x_request_priority="urgent"))


def test_rows_are_counted():
    seen = ask()
    seen.rows = 10
    MaxRows(10).admit_rows(seen)
    seen.rows = 11
    with pytest.raises(BodyTooLargeError, match="11 rows and the limit is 10"):
        MaxRows(10).admit_rows(seen)


names = st.sampled_from(
    [b"authorization", b"x-api-key", b"x-request-timeout-ms", b"x-request-priority", b"x"]
)


@cache
def authentication() -> Authentication:
    folder = Path(tempfile.mkdtemp())
    write_keys(folder / "keys", [new_key("ann")[1]])
    return Authentication([ApiKeys(folder / "keys"), by_file(Issuer(), folder)._authenticators[0]])


@given(st.dictionaries(names, st.binary(max_size=60) | st.just(b"Bearer a.b.c")))
def test_no_header_breaks_a_rule(headers: dict[bytes, bytes]):
    rules = [authentication(), Deadlines(), Priorities()]
    for rule in rules:
        try:
            rule.admit(Ask("numbers", headers))
        except TwinpathError:
            continue


# the audit log, exposure


def test_the_audit_log_has_a_line_for_each_request_and_no_secret(tmp_path: Path):
    log = AuditLog(tmp_path / "logs" / "audit.jsonl", "numbers")
    seen = ask(authorization="Bearer tp_secret")
    seen.principal, seen.rows, seen.request_id, seen.path = "ann", 3, b"id-1", "/predict"
    log.done(seen, 200, "ok")
    log.done(ask(), 429, "rate_limited")
    log.close()
    text = (tmp_path / "logs" / "audit.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["principal"], first["rows"], first["status"]) == ("ann", 3, 200)
    assert (first["request_id"], first["path"], second["code"]) == (
        "id-1",
        "/predict",
        "rate_limited",
    )
    assert first["latency_ms"] >= 0
    assert "secret" not in text


def test_lines_that_do_not_fit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("twinpath.online.gateway.audit._BOUND", 2)
    monkeypatch.setattr("twinpath.online.gateway.audit._PAUSE_S", 60)
    log = AuditLog(tmp_path / "audit", "numbers")
    for _ in range(5):
        log.done(ask(), 200, "ok")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [line.get("dropped") for line in lines] == [None, None, 3]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_a_public_address_needs_authentication(host: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="allow_unauthenticated"):
        refuse_public(host, GatewayArgs())
    refuse_public(host, GatewayArgs(allow_unauthenticated=True))
    refuse_public(host, GatewayArgs(api_keys=tmp_path))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_loopback_needs_none(host: str):
    refuse_public(host, GatewayArgs())


# in the app


class Number(BaseModel):
    x: float


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": np.asarray(columns["x"]) * 2}


def app_with(**settings: Any) -> GraphApp:
    graph = Graph("numbers", input=Number, output=Number)
    with graph as number:
        graph.output(Double()(number))
    executor = Executor(graph.plan)
    executor.setup()
    args = GatewayArgs.model_validate(settings)
    batcher = Batcher(executor.run, Batch())
    return graph_app(graph.plan, batcher, max_body_bytes=1000, gateway=args)


def client(app: GraphApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


async def test_every_endpoint_is_guarded_and_probes_are_not(tmp_path: Path):
    key, record = new_key("ann")
    write_keys(tmp_path / "keys", [record])
    body = {"rows": [{"x": 2}]}
    async with client(app_with(api_keys=str(tmp_path / "keys"))) as session:
        for path in ("/openapi.json", "/docs", "/v2/models/numbers", "/v1/models/numbers"):
            assert (await session.get(path)).status_code == 401
            assert (await session.get(path, headers=bearer(key))).status_code == 200
        for path in ("/predict", "/v2/models/numbers/infer", "/v1/models/numbers:predict",
                     "/invocations", "/v2/repository/models/numbers/unload"):  # fmt: skip
            refused = await session.post(path, json=body)
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/ping"):
            assert (await session.get(path)).status_code == 200, path
        answer = await session.post("/predict", json=body, headers=bearer(key))
        assert answer.json() == {"rows": [{"x": 4.0}]}


async def test_limits_answer_429_with_a_time_to_wait(tmp_path: Path):
    async with client(app_with(limits={"rate": "2/minute"}, max_rows=1)) as session:
        for _ in range(2):
            assert (await session.post("/predict", json={"rows": [{"x": 2}]})).status_code == 200
        refused = await session.post("/predict", json={"rows": [{"x": 2}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 60


async def test_too_many_rows_are_413():
    async with client(app_with(max_rows=1)) as session:
        refused = await session.post("/predict", json={"rows": [{"x": 2}] * 2})
        assert refused.status_code == 413


async def test_browsers_of_allowed_origins_may_ask():
    app = app_with(cors={"allow_origins": ["https://me"]})
    asked = {"origin": "https://me", "access-control-request-method": "POST"}
    async with client(app) as session:
        preflight = await session.options("/predict", headers=asked)
        assert preflight.headers["access-control-allow-origin"] == "https://me"
        other = await session.options("/predict", headers=asked | {"origin": "https://eve"})
        assert "access-control-allow-origin" not in other.headers
        answer = await session.post(
            "/predict", json={"rows": [{"x": 1}]}, headers={"origin": "https://me"}
        )
        assert answer.headers["access-control-allow-origin"] == "https://me"
        assert "ratelimit" in answer.headers["access-control-expose-headers"]
    assert app.frontend.cors


async def test_grpc_calls_beside_inference_are_audited_too(tmp_path: Path):
    key, record = new_key("ann")
    write_keys(tmp_path / "keys", [record])
    log = tmp_path / "audit"
    app = app_with(api_keys=str(tmp_path / "keys"), audit_log=str(log))
    service = OipService(app.frontend)
    message = pb.ModelMetadataRequest(name="numbers")
    for metadata in ((), (("x-api-key", key),)):
        ask = service.ask("ModelMetadata", metadata, "ipv4:10.0.0.1:4711", None, 9)
        with contextlib.suppress(AccessError):
            await service.other("ModelMetadata", message, ask)
    app.frontend.gate.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["principal"], line["code"]) for line in lines] == [
        (None, AccessError.code), ("ann", "ok")
    ]  # fmt: skip


async def test_ids_that_could_not_stand_in_a_log_are_replaced():
    async with client(app_with()) as session:
        for given_id, kept in (("id-1", True), ("a b", False), ("x" * 129, False)):
            answer = await session.post(
                "/predict", json={"rows": [{"x": 1}]}, headers={"x-request-id": given_id}
            )
            assert (answer.headers["x-request-id"] == given_id) is kept


async def test_where_the_time_went_is_told_on_demand():
    async with client(app_with()) as session:
        quiet = await session.post("/predict", json={"rows": [{"x": 1}]})
        assert "server-timing" not in quiet.headers
        told = await session.post(
            "/predict", json={"rows": [{"x": 1}]}, headers={"x-server-timing": "1"}
        )
    parts = dict(re.findall(r"([\w-]+);dur=([\d.]+)", told.headers["server-timing"]))
    assert {"decode", "queue", "run", "node-double", "encode", "total"} <= parts.keys()
    assert float(parts["node-double"]) <= float(parts["run"]) <= float(parts["total"])
    assert "batch of 1 rows" in told.headers["server-timing"]


async def test_a_deadline_in_a_header_is_kept():
    async with client(app_with()) as session:
        late = await session.post(
            "/predict", json={"rows": [{"x": 1}]}, headers={"x-request-timeout-ms": "0.000001"}
        )
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_the_rules_are_a_list_to_look_at(tmp_path: Path):
    write_keys(tmp_path / "keys", [new_key("ann")[1]])
    args = {"api_keys": str(tmp_path / "keys"), "limits": {"rate": "1/second"}, "max_rows": 5}
    rules = build(GatewayArgs.model_validate(args), "numbers").rules
    names = [type(rule).__name__ for rule in rules]
    assert names == ["Authentication", "Limit", "Deadlines", "Priorities", "MaxRows"]


# shared by replicas


async def test_replicas_count_together_in_redis(redis_url: str):
    settings = {"limits": {"rate": "5/minute", "quota": "7/day", "redis_url": redis_url}}
    first, second = (build(GatewayArgs.model_validate(settings), "numbers") for _ in range(2))

    async def admit(gateway: Gateway, name: str) -> None:
        seen = ask()
        seen.principal = name
        pending = gateway.admit(seen)
        assert pending is not None
        await pending

    for gateway in (first, second, first, second, first):
        await admit(gateway, "ann")
    with pytest.raises(LimitError, match="5/minute"):
        await admit(second, "ann")
    await admit(second, "ben")


async def test_the_app_answers_by_the_shared_count(redis_url: str):
    app = app_with(limits={"rate": "2/minute", "redis_url": redis_url})
    async with client(app) as session:
        statuses = [
            (await session.post("/predict", json={"rows": [{"x": 2}]})).status_code
            for _ in range(3)
        ]
    assert statuses == [200, 200, 429]
