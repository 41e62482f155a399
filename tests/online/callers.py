"""Clients that speak HTTP by hand, so that they can be many, and leave when they like."""

import asyncio
import json
from dataclasses import dataclass


@dataclass
class Reply:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Why it was refused."""
        code: str = json.loads(self.body)["error"]["code"]
        return code


class Caller:
    """One client of the graph `waiting` with a connection of its own, and a row that no other has,
    which keeps the graph busy for some seconds."""

    def __init__(self, port: int, number: int, seconds: float = 0.01, app: str = "waiting") -> None:
        self._port, self._number, self._seconds, self._app = port, number, seconds, app
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def ask(self, **headers: str) -> None:
        """Send the request."""
        row = {"x": self._seconds, "label": f"row {self._number}"}
        body = json.dumps({"rows": [row]}).encode()
        lines = [f"POST /{self._app}/predict HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def answer(self) -> Reply:
        """What comes back."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        if headers.get("transfer-encoding") == "chunked":  # what Serve itself answers
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        self.writer.close()
        return Reply(int(head[0].split()[1]), headers, body)

    def hang_up(self) -> None:
        """Go away without waiting for it."""
        self.writer.close()

    def is_right(self, reply: Reply) -> bool:
        """Whether this is the answer to its own row."""
        rows = [{"y": self._seconds, "label": f"row {self._number}"}]
        return reply.status == 200 and json.loads(reply.body) == {"rows": rows}


async def answered(callers: list[Caller]) -> list[Reply]:
    """What each got."""
    return await asyncio.gather(*(caller.answer() for caller in callers))


def all_right(callers: list[Caller], replies: list[Reply]) -> bool:
    """Whether each got the answer to its own row."""
    return all(caller.is_right(reply) for caller, reply in zip(callers, replies, strict=True))
