"""What must not break the gateway: files, providers, logs and apps that misbehave."""

import asyncio
import datetime as dt
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from twinpath.cli.main import app as command
from twinpath.errors import AccessError, ConfigError, RetryLaterError, TwinpathError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway import audit as audit_module
from twinpath.online.gateway import keys as keys_module
from twinpath.online.gateway import tokens as tokens_module
from twinpath.online.gateway.args import CorsArgs, GatewayArgs, JwtArgs
from twinpath.online.gateway.audit import AuditLog
from twinpath.online.gateway.authentication import Principal
from twinpath.online.gateway.build import build
from twinpath.online.gateway.keys import ApiKeys, new_key, read_keys, replace_key, write_keys
from twinpath.online.gateway.middleware import Guarded
from twinpath.online.gateway.tokens import Tokens
from twinpath.online.policy import Priority

NOW = dt.datetime.now(dt.UTC)
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())


def public(*kids: str) -> dict[str, Any]:
    algorithms = jwt.algorithms
    rsa_key = json.loads(algorithms.RSAAlgorithm.to_jwk(RSA.public_key())) | {"alg": "RS256"}
    ec_key = json.loads(algorithms.ECAlgorithm.to_jwk(EC.public_key())) | {"alg": "ES256"}
    return {"keys": [(ec_key if kid == "ec" else rsa_key) | {"kid": kid} for kid in kids]}


def token(kid: str | None = "rsa", signer: Any = RSA, **claims: Any) -> bytes:
    whole = {"sub": "ann", "aud": "me", "exp": time.time() + 60, "scope": "graph:*"} | claims
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(whole, signer, "RS256" if signer is RSA else "ES256", headers).encode()


def by_file(path: Path, *kids: str, **more: Any) -> Tokens:
    path.write_text(json.dumps(public(*(kids or ("rsa", "ec")))))
    return Tokens(JwtArgs(jwks_file=path, audience="me", **more))


# API keys


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b'{"id": "abcd"}'])
def test_a_file_of_keys_that_breaks_leaves_them_as_they_were(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keys_module, "CHECK_S", -1.0)
    key, record = new_key("ann")
    write_keys(tmp_path / "keys", [record])
    keys = ApiKeys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(content)
    assert keys.principal(key.encode()).name == "ann"
    (tmp_path / "keys").unlink()
    assert keys.principal(key.encode()).name == "ann"
    write_keys(tmp_path / "keys", [])
    with pytest.raises(AccessError):
        keys.principal(key.encode())


def test_many_keys_are_read_at_once(tmp_path: Path):
    records = [new_key(f"p{number}")[1] for number in range(5000)]
    write_keys(tmp_path / "keys", records)
    started_s = time.thread_time()
    assert read_keys(tmp_path / "keys") == records
    # A tenth of a second; a slow hash for each key would take minutes.
    assert time.thread_time() - started_s < 5, "requests wait while a changed file is read"


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    record = new_key("ann")[1]
    write_keys(tmp_path / "keys", [record, record])
    with pytest.raises(ConfigError, match="twice"):
        read_keys(tmp_path / "keys")


def test_an_expiry_says_its_time_zone(tmp_path: Path):
    line = new_key("ann")[1].model_dump_json(exclude_none=True)
    text = line.replace("}", ', "expires": "2030-01-01T00:00:00"}')
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match="expires"):
        read_keys(tmp_path / "keys")


def test_a_rotated_key_ends_later_and_its_successor_may_do_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, record = new_key("ann", ("a",), "low", rate="5/second")
    path = tmp_path / "keys"
    new, records = replace_key([record], record.id, NOW + dt.timedelta(hours=1))
    write_keys(path, records)
    keys = ApiKeys(path)
    before, after = keys.principal(old.encode()), keys.principal(new.encode())
    assert (after.name, after.graphs, after.max_priority) == ("ann", {"a"}, Priority.LOW)
    assert after.limits == before.limits
    assert after.expires_s is None
    monkeypatch.setattr("time.time", lambda: (NOW + dt.timedelta(hours=2)).timestamp())
    with pytest.raises(AccessError, match="expired"):
        keys.principal(old.encode())
    assert keys.principal(new.encode()).name == "ann"


def test_rotating_never_lets_a_key_live_longer():
    _, record = new_key("ann", expires=NOW)
    _, (old, _) = replace_key([record], record.id, NOW + dt.timedelta(days=9))
    assert old.expires == NOW
    with pytest.raises(ConfigError, match="Did you mean"):
        replace_key([record], record.id[:-1], NOW)


def test_the_command_line_rotates_and_limits_keys(tmp_path: Path):
    runner, file = CliRunner(), str(tmp_path / "keys")
    runner.invoke(command, ["keys", "new", file, "--principal", "ann", "--rate", "5/second"])
    first = read_keys(tmp_path / "keys")[0].id
    made = runner.invoke(command, ["keys", "rotate", file, first, "--hours", "0"])
    assert made.exit_code == 0
    assert ApiKeys(tmp_path / "keys").principal(made.stdout.strip().encode()).name == "ann"
    old, new = read_keys(tmp_path / "keys")
    assert (old.id, old.rate, new.rate) == (first, "5/second", "5/second")
    assert old.expires is not None
    assert old.expires <= dt.datetime.now(dt.UTC)
    assert "5/second" in runner.invoke(command, ["keys", "list", file]).stdout
    bad = runner.invoke(command, ["keys", "new", file, "--principal", "x", "--quota", "much"])
    assert bad.exit_code == 2
    assert len(read_keys(tmp_path / "keys")) == 2


# tokens


@pytest.mark.parametrize(("kid", "signer"), [("rsa", EC), ("ec", RSA)])
def test_a_key_of_another_kind_opens_nothing(kid: str, signer: Any, tmp_path: Path):
    keys = by_file(tmp_path / "jwks")
    with pytest.raises(AccessError):
        keys.principal(token(kid, signer))


@pytest.mark.parametrize("scope", [5, None, {"graph:a": 1}, [["graph:a"], 7], ""])
def test_a_strange_scope_opens_nothing(scope: Any, tmp_path: Path):
    found = by_file(tmp_path / "jwks").principal(token(scope=scope))
    assert isinstance(found, Principal)
    assert found.graphs == frozenset()


def test_scopes_may_be_a_list(tmp_path: Path):
    found = by_file(tmp_path / "jwks").principal(token(scope=["graph:a", "other", "graph:b"]))
    assert isinstance(found, Principal)
    assert found.graphs == {"a", "b"}


def test_a_name_that_could_stand_in_no_log_is_refused(tmp_path: Path):
    with pytest.raises(AccessError):
        by_file(tmp_path / "jwks").principal(token(sub="\ud800"))


@pytest.mark.parametrize(
    ("head", "says"), [(b"W1tb" * 1500, "no"), (b"W1tb" * 9000, "longer than")]
)
def test_deep_and_long_tokens_are_refused(head: bytes, says: str, tmp_path: Path):
    with pytest.raises(AccessError, match=says):
        by_file(tmp_path / "jwks").principal(head + b".e30.x")


FILE: dict[str, Tokens] = {}


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=40) | st.just(b"eyJhbGciOiJSUzI1NiJ9"), min_size=3, max_size=3))
def test_no_token_breaks_a_request(tmp_path_factory: Any, parts: list[bytes]):
    keys = FILE.setdefault("keys", by_file(tmp_path_factory.mktemp("t") / "jwks"))
    with pytest.raises(TwinpathError):
        keys.principal(b".".join(parts))


def test_tokens_are_as_urgent_as_the_settings_allow(tmp_path: Path):
    usual = by_file(tmp_path / "jwks").principal(token())
    high = by_file(tmp_path / "jwks", priority="high").principal(token())
    assert isinstance(usual, Principal)
    assert isinstance(high, Principal)
    assert (usual.max_priority, high.max_priority) == (Priority.NORMAL, Priority.HIGH)


def test_a_file_of_issuers_keys_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens_module, "_CHECK_S", -1.0)
    keys = by_file(tmp_path / "jwks", "old")
    first = token("old")
    assert isinstance(keys.principal(first), Principal)
    (tmp_path / "jwks").write_text("{")
    assert isinstance(keys.principal(first), Principal)
    (tmp_path / "jwks").write_text(json.dumps(public("new")))
    with pytest.raises(AccessError, match="does not publish"):
        keys.principal(first)
    assert isinstance(keys.principal(token("new")), Principal)


class Provider:
    """An issuer's keys over HTTP: what it answers, how slowly, and how often it was asked."""

    def __init__(self) -> None:
        self.body = json.dumps(public("rsa")).encode()
        self.delay_s, self.asked = 0.0, 0


@pytest.fixture
def provider() -> Iterator[tuple[str, Provider]]:
    state = Provider()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            time.sleep(state.delay_s)
            if state.body == b"garbage":
                self.wfile.write(b"\x00\x01 no HTTP\r\n\r\n")
                return
            self.send_response(200)
            self.send_header("content-length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", state
    server.shutdown()


async def name_of(keys: Tokens, credentials: bytes) -> str:
    found = keys.principal(credentials)
    return (found if isinstance(found, Principal) else await found).name


async def test_requests_during_the_first_fetch_wait_for_it(provider: tuple[str, Provider]):
    url, state = provider
    state.delay_s = 0.3
    keys = Tokens(JwtArgs(jwks_url=url, audience="me"))
    first = asyncio.create_task(name_of(keys, token(sub="ann")))
    await asyncio.sleep(0.1)
    assert await name_of(keys, token(sub="ben")) == "ben"
    assert await first == "ann"
    assert state.asked == 1


async def test_old_keys_are_renewed_behind_the_requests_backs(provider: tuple[str, Provider]):
    url, state = provider
    keys = Tokens(JwtArgs(jwks_url=url, audience="me", refresh_s=0.2))
    known = token()
    await name_of(keys, known)
    await asyncio.sleep(0.3)
    state.delay_s, state.body = 0.3, json.dumps(public("other")).encode()
    started_s = time.monotonic()
    assert await name_of(keys, known) == "ann"
    assert time.monotonic() - started_s < 0.1, "nobody waits for the renewal"
    await asyncio.sleep(0.5)
    with pytest.raises(AccessError, match="does not publish"):
        await name_of(keys, known)  # taken back by its issuer, however well known it was


@pytest.mark.parametrize("body", [b"garbage", b"{}", b"[]", b"\xff", b'{"keys": []}'])
async def test_a_provider_that_never_had_keys_is_no_fault_of_the_caller(
    body: bytes, provider: tuple[str, Provider]
):
    url, state = provider
    state.body = body
    keys = Tokens(JwtArgs(jwks_url=url, audience="me"))
    with pytest.raises(RetryLaterError, match="cannot be had"):
        await name_of(keys, token())
    with pytest.raises(RetryLaterError):
        await name_of(keys, token())
    assert state.asked == 1, "it is not asked for every request"


async def test_a_caller_that_hangs_up_stops_no_fetch(provider: tuple[str, Provider]):
    url, state = provider
    state.delay_s = 0.3
    keys = Tokens(JwtArgs(jwks_url=url, audience="me"))
    gone = asyncio.create_task(name_of(keys, token()))
    stays = asyncio.create_task(name_of(keys, token(sub="ben")))
    await asyncio.sleep(0.1)
    gone.cancel()
    assert await stays == "ben"


def test_browsers_credentials_are_not_for_all_origins():
    with pytest.raises(ValidationError, match="lets every site act"):
        CorsArgs(allow_origins=("*",), allow_credentials=True)
    CorsArgs(allow_origins=("https://me",), allow_credentials=True)


# the audit log


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_PAUSE_S", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_log_that_cannot_be_written_counts_its_lines_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "audit"
    path.mkdir()
    log = AuditLog(path, "numbers")
    for _ in range(3):
        log.done(Ask("numbers", {}), 200, "ok")
    until(lambda: log._unwritten == 3)
    path.rmdir()
    log.done(Ask("numbers", {}), 200, "ok")
    until(path.is_file)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line.get("dropped", 0) for line in lines) == [0, 3]
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.usefixtures("quick")
@settings(max_examples=50, deadline=None)
@given(principal=st.text(st.characters()) | st.none(), path=st.text(st.characters(), max_size=999))
def test_whatever_stands_in_a_request_is_one_line(
    tmp_path_factory: Any, principal: str | None, path: str
):
    file = tmp_path_factory.mktemp("audit") / "log"
    log = AuditLog(file, "numbers")
    seen = Ask("numbers", {}, path=path, peer="\udcff\n")
    seen.principal = principal
    log.done(seen, 200, "ok")
    log.close()
    [line, rest] = file.read_bytes().split(b"\n")
    assert rest == b""
    assert len(json.loads(line)["path"]) <= 512


@pytest.mark.usefixtures("quick")
def test_lines_lost_more_than_once_are_all_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audit_module, "_BOUND", 0)
    log = AuditLog(tmp_path / "audit", "numbers")

    def told() -> int:
        lines = (tmp_path / "audit").read_text().splitlines()
        return sum(json.loads(line)["dropped"] for line in lines)

    for lost in (2, 5):
        while log._overflowed < lost:
            log.done(Ask("numbers", {}), 200, "ok")
        until(lambda: (tmp_path / "audit").exists() and told() == log._overflowed)
    log.close()


# around other apps


def guarded(app: Any, tmp_path: Path, **given: Any) -> tuple[httpx.AsyncClient, Callable[[], Any]]:
    """A client of a guarded app, and the audit's lines once all are written."""
    path = tmp_path / "audit"
    gate = build(GatewayArgs.model_validate(given | {"audit_log": str(path)}), "numbers")
    whole = Guarded(app, gate, lambda scope: Ask("numbers", {}, path=scope["path"]))
    transport = httpx.ASGITransport(whole, raise_app_exceptions=False)

    def lines() -> list[tuple[int, str]]:
        gate.close()
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["status"], line["code"]) for line in found]

    return httpx.AsyncClient(transport=transport, base_url="http://x"), lines


async def pages(scope: Scope, receive: Receive, send: Send) -> None:
    """The path is the status; ``/fails`` raises, ``/leaves`` never answers."""
    if scope["path"] == "/fails":
        raise ValueError("oh")
    if scope["path"] == "/leaves":
        return
    status = int(scope["path"][1:])
    await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b""})


async def test_the_audit_tells_how_pages_really_ended(tmp_path: Path):
    client, lines = guarded(pages, tmp_path)
    async with client:
        for path in ("/200", "/404", "/503", "/fails"):
            await client.get(path)
    assert await asyncio.to_thread(lines) == [
        (200, "ok"), (404, "http_404"), (503, "http_503"), (500, "internal"),
    ]  # fmt: skip


async def test_a_page_that_is_left_unanswered_is_499(tmp_path: Path):
    gate = build(GatewayArgs(audit_log=tmp_path / "audit"), "numbers")
    whole = Guarded(pages, gate, lambda scope: Ask("numbers", {}))

    async def nothing(*_: Any) -> Any:
        return {}

    await whole({"type": "http", "path": "/leaves"}, nothing, nothing)
    await asyncio.to_thread(gate.close)
    assert json.loads((tmp_path / "audit").read_text())["status"] == 499


async def test_pages_tell_limits_too(tmp_path: Path):
    client, lines = guarded(pages, tmp_path, limits={"rate": "2/day"})
    async with client:
        answers = [await client.get("/200") for _ in range(3)]
    told = [answer.headers["ratelimit"].split(";")[:2] for answer in answers]
    assert told == [['"rate"', f"r={left}"] for left in (1, 0, 0)]
    assert answers[0].headers["ratelimit-policy"] == '"rate";q=2;w=86400'
    assert answers[0].headers["a"] == "b"
    assert answers[2].status_code == 429
    assert int(answers[2].headers["retry-after"]) >= 1
    assert await asyncio.to_thread(lines) == [(200, "ok"), (200, "ok"), (429, "rate_limited")]
