"""Reads Feast's Redis layout: one pipeline of HMGET for all entities and views of a batch.

A hash holds all features of an entity, for every view; its key is the serialized entity key and
the project, its fields are murmur3 hashes of ``view:feature``, and ``_ts:view`` is the event
timestamp (Feast: ``docs/specs/online_store_format.md``). The connection speaks RESP2 with hiredis:
commands are joined from prepared parts and replies are parsed in C. It is shared by all batches
under way, since Redis answers in the order of the commands.
"""

import asyncio
import json
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import MissingExtraError
from twinpath.features.decode import timestamps
from twinpath.features.spec import ViewSpec
from twinpath.features.store import RawRow, Wanted


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis server is, and how to log in."""

    host: str
    port: int
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_ca_file: str | None = None
    tls_verify: bool = True


_UNDERSTOOD = {
    *("db", "username", "password", "ssl", "ssl_ca_certs", "ssl_cert_reqs"),
    *("socket_timeout", "socket_connect_timeout", "socket_keepalive"),
}


def address_of(config: Any) -> Address | None:
    """The address in Feast's connection string; None for what is left to Feast's own client
    (Redis Cluster, Sentinel, options that are not understood here)."""
    if str(getattr(config.redis_type, "value", config.redis_type)) != "redis":
        return None
    parts = config.connection_string.split(",")
    nodes = [part for part in parts if "=" not in part]
    given = dict(part.split("=", 1) for part in parts if "=" in part)
    if len(nodes) != 1 or not set(given) <= _UNDERSTOOD:
        return None
    host, _, port = nodes[0].rpartition(":")
    return Address(
        host=host or nodes[0],
        port=int(port) if host else 6379,
        db=int(given.get("db", 0)),
        username=_plain(given.get("username")),
        password=_plain(given.get("password")),
        tls=given.get("ssl", "false").lower() == "true",
        tls_ca_file=_plain(given.get("ssl_ca_certs")),
        tls_verify=_plain(given.get("ssl_cert_reqs")) != "none",
    )


def _plain(text: str | None) -> str | None:
    """A value of a connection string, which may be quoted as JSON."""
    return json.loads(text) if text and text.startswith('"') else text


class RedisReader:
    """See `StoreReader`. A connection that fails, or is late by ``timeout_s``, is given up with
    all reads on it, and the next read makes a new one."""

    ends_in_time = True

    def __init__(
        self,
        address: Address,
        project: str,
        groups: Sequence[Sequence[ViewSpec]],
        timeout_s: float,
    ) -> None:
        try:
            import hiredis  # noqa: F401
            import mmh3
        except ImportError as error:
            raise MissingExtraError(error.name or "hiredis", "features") from None
        self.suffix = project.encode()
        self._address, self._timeout_s = address, timeout_s
        self._connection: Connection | None = None
        self._connecting: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: For each group the fields of its hash, and what surrounds the key in its HMGET.
        self.fields: list[list[bytes]] = []
        self._commands: list[tuple[Callable[[int], bytes], bytes]] = []
        for views in groups:
            fields: list[bytes] = []
            for view in views:
                fields += [
                    mmh3.hash(f"{view.name}:{name}", signed=False).to_bytes(4, "little")
                    for name in view.features
                ]
                fields.append(b"_ts:" + view.name.encode())
            self.fields.append(fields)
            head = _heads(len(fields) + 2)
            tail = b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in fields)
            self._commands.append((head, b"\r\n" + tail))

    async def read(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        """See `StoreReader`. Raises OSError, or hiredis.ReplyError for an error of the server."""
        parts: list[bytes] = []
        for want in wanted:
            head, tail = self._commands[want.group]
            for key in want.keys:
                parts += (head(len(key)), key, tail)
        commands, count = b"".join(parts), sum(len(want.keys) for want in wanted)
        connection = self._connection
        if connection is None or connection.lost or self._loop is not asyncio.get_running_loop():
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect()
                replies = await connection.ask(commands, count, self._timeout_s)
        else:
            replies = await connection.ask(commands, count, self._timeout_s)
        answers, start = [], 0
        for want in wanted:
            answers.append(replies[start : start + len(want.keys)])
            start += len(want.keys)
        return answers

    def moments(self, raw: Sequence[Any]) -> NDArray[np.int64]:
        """See `StoreReader`."""
        return timestamps(raw)

    async def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.end()

    async def _connect(self) -> "Connection":
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._connecting = loop, asyncio.Lock()
        assert self._connecting is not None
        async with self._connecting:
            connection = self._connection
            if connection is None or connection.lost or connection.loop is not loop:
                connection = await open_connection(self._address, self._timeout_s)
                self._connection = connection
            return connection


def _heads(words: int) -> Callable[[int], bytes]:
    """What begins an HMGET of so many words, by the length of its key."""

    @lru_cache(maxsize=256)
    def head(length: int) -> bytes:
        return b"*%d\r\n$5\r\nHMGET\r\n$%d\r\n" % (words, length)

    return head


class _Asked(NamedTuple):
    replies: int
    future: "asyncio.Future[list[Any]]"
    limit: asyncio.TimerHandle


class Connection(asyncio.Protocol):
    """One connection: commands go out, replies come back in the same order."""

    def __init__(self) -> None:
        import hiredis

        self.loop = asyncio.get_running_loop()
        self.lost = False
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        #: Reads whose replies are not there: how many they are, who waits, and for how long.
        self._waiting: deque[_Asked] = deque()
        self._replies: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Of asyncio: complete the reads whose replies are all there."""
        import hiredis

        self._reader.feed(data)
        replies = self._replies
        try:
            while (reply := self._reader.gets()) is not False:
                replies.append(reply)
                if self._waiting and len(replies) == self._waiting[0].replies:
                    asked = self._waiting.popleft()
                    asked.limit.cancel()
                    self._replies = []
                    _resolve(asked.future, replies)
                    replies = self._replies
        except hiredis.ProtocolError as error:
            self._fail(ConnectionResetError(f"Redis sent what is no reply: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio: reads under way fail."""
        self._fail(ConnectionResetError(f"Redis closed the connection ({error})"))

    async def ask(self, commands: bytes, replies: int, timeout_s: float) -> list[Any]:
        """Send commands and wait for their replies. A caller may give up: its replies are dropped
        when they come. Where they do not come within ``timeout_s`` the connection ends, and all
        reads that wait for it fail: replies would pile up behind a server that does not answer."""
        if self.lost or self._transport is None:
            raise ConnectionResetError("the connection to Redis was lost")
        future: asyncio.Future[list[Any]] = self.loop.create_future()
        limit = self.loop.call_later(timeout_s, self._late, timeout_s)
        self._waiting.append(_Asked(replies, future, limit))
        self._transport.write(commands)
        return await future

    def _late(self, timeout_s: float) -> None:
        self._fail(TimeoutError(f"Redis did not answer within {timeout_s * 1000:g} ms"))

    def end(self) -> None:
        """Close it; reads under way fail."""
        self._fail(ConnectionResetError("the connection to Redis was closed"))

    def _fail(self, error: OSError) -> None:
        self.lost = True
        if self._transport is not None:
            self._transport.abort()
        while self._waiting:
            asked = self._waiting.popleft()
            asked.limit.cancel()
            if not asked.future.done():
                asked.future.set_exception(error)


def _resolve(future: "asyncio.Future[list[Any]]", replies: list[Any]) -> None:
    if future.done():
        return
    wrong = next((reply for reply in replies if isinstance(reply, Exception)), None)
    if wrong is not None:
        future.set_exception(wrong)
    else:
        future.set_result(replies)


async def open_connection(address: Address, timeout_s: float) -> Connection:
    """Connect and log in. Raises OSError (TimeoutError among them), hiredis.ReplyError."""
    context = None
    if address.tls:
        context = ssl.create_default_context(cafile=address.tls_ca_file)
        if not address.tls_verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        _, connection = await loop.create_connection(
            Connection, address.host, address.port, ssl=context
        )
        try:
            if address.password is not None:
                login = [address.username] if address.username else []
                await connection.ask(command("AUTH", *login, address.password), 1, timeout_s)
            if address.db:
                await connection.ask(command("SELECT", str(address.db)), 1, timeout_s)
        except BaseException:
            connection.end()
            raise
    return connection


def command(*words: str) -> bytes:
    """A command in RESP."""
    encoded = [word.encode() for word in words]
    parts = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
    return b"*%d\r\n" % len(encoded) + parts
