"""Requests begin one by one, with turns of the event loop between for what waits to be sent."""

import asyncio
from collections import deque

#: Turns from the beginning of one request to that of the next.
TURNS = 2


class OneByOne:
    """``await begin()`` returns at once, or after those that came before.

    An engine's request takes a millisecond or more of the loop until the engine has it. Three that
    come together would hold the tokens of all streams back for the time of all three; with turns
    between, tokens that have come meanwhile go out first.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def begin(self) -> None:
        """Wait for this request's turn."""
        loop = asyncio.get_running_loop()
        if not self._busy:
            self._busy = True
            loop.call_soon(self._turn, loop, TURNS)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self, loop: asyncio.AbstractEventLoop, left: int) -> None:
        if left > 1:
            loop.call_soon(self._turn, loop, left - 1)
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # one that was cancelled has gone
                turn.set_result(None)
                loop.call_soon(self._turn, loop, TURNS)
                return
        self._busy = False
