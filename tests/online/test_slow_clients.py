"""Clients that send a byte now and then, or nothing any more, beside ordinary ones."""

import asyncio
import json

import psutil
import pytest

from online.callers import Caller, all_right, answered
from online.conftest import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]
START = b"POST /waiting/predict HTTP/1.1\r\nhost: x\r\n"


class Slow:
    """A client that has begun a request, and sends bytes that do not end it."""

    def __init__(self, begin: bytes, drop: bytes) -> None:
        self._begin, self._drop = begin, drop
        self.got = b""

    async def linger(self, port: int, seconds: float) -> None:
        """Until it is answered, or for so long."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(self._begin)
        for _ in range(round(seconds / 0.25)):
            try:
                async with asyncio.timeout(0.25):
                    self.got = await reader.read(1000)
                    break
            except TimeoutError:
                writer.write(self._drop)
            except ConnectionError:
                break
        writer.close()


def connections(served: Served) -> int:
    """How many are open to the replica of `waiting`."""
    [replica] = [
        process
        for process in served.session.processes()
        if process.name().startswith("ray::ServeRepl") and "waiting" in process.cmdline()[0]
    ]
    return sum(each.status == psutil.CONN_ESTABLISHED for each in http_of(replica))


def http_of(replica: psutil.Process) -> list[psutil.Process]:
    """Connections to the ports that the replica listens on."""
    found = replica.net_connections("tcp")
    ports = {each.laddr.port for each in found if each.status == psutil.CONN_LISTEN}
    return [each for each in found if each.laddr.port in ports]


async def test_two_hundred_slow_clients_harm_nobody_and_lose_their_places(served: Served):
    """The body of a request to `waiting` has three seconds."""
    port = served.session.http_port
    headers = [Slow(START + b"x-slow: ", b"a") for _ in range(100)]
    length, chunked = b"content-length: 99\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n"
    bodies = [
        Slow(START + more, drop)
        for more, drop in ((length, b" "), (length, b""), (chunked, b"1\r\n \r\n"))
        for _ in range(34)
    ]
    slow = asyncio.gather(*(each.linger(port, 15) for each in bodies))
    slower = asyncio.gather(*(each.linger(port, 60) for each in headers))
    held, answers = 0, 0
    while not slow.done():
        callers = [Caller(port, number) for number in range(8)]
        await asyncio.gather(*(caller.ask() for caller in callers))
        assert all_right(callers, await answered(callers))
        held = max(held, await asyncio.to_thread(connections, served))
        answers += len(callers)
        await asyncio.sleep(0.1)
    assert held >= len(bodies)
    assert answers > 100
    for each in bodies:
        assert each.got.startswith(b"HTTP/1.1 408 "), each.got
        assert json.loads(each.got.partition(b"\r\n\r\n")[2])["error"]["code"] == "slow_body"
    async with asyncio.timeout(30):
        while await asyncio.to_thread(connections, served) > held - 90:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    slower.cancel()
    assert not any(each.got for each in headers), "they are HAProxy's to give up, and later"


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (START + b"x-huge: " + b"a" * 100_000 + b"\r\n\r\n", {400, 431}),
        (START + b"x: y\r\n" * 2000 + b"\r\n", {400, 431}),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", {400, 414}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n", {400}),
        (b"GET /waiting/" + b"%" * 5000 + b" HTTP/1.1\r\n\r\n", {404}),
        (START + b"content-length: -1\r\n\r\n", {400}),
        (START + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", {400}),
        (START + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
        (START + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", {400}),
        (b"POST /waiting/predict HTTP/1.1\r\nno colon\r\n\r\n", {400}),
        (b"POST /waiting/predict\x00 HTTP/1.1\r\nhost: x\r\n\r\n", {400}),
    ],
    ids=["huge header", "many headers", "long path", "TLS", "percents", "negative length",
         "two lengths", "length and chunks", "chunk size", "no colon", "a nul"],
)  # fmt: skip
async def test_what_is_no_http_is_refused(served: Served, sent: bytes, statuses: set[int]):
    port = served.session.http_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(20):
        answer = await reader.read(1000)
    writer.close()
    assert int(answer.split()[1]) in statuses, answer
    caller = Caller(port, 1)
    await caller.ask()
    assert caller.is_right(await caller.answer())
