"""A replica that cannot answer any more ends at once, instead of when Serve has found out.

Until Serve has called a health check several times, requests go on coming: a replica that refuses
each within a millisecond has the fewest under way, so the balancer gives it nearly all of them. A
connection that is refused is tried elsewhere, and Serve replaces a process that is gone at its next
look.
"""

import asyncio
import logging
import os
from collections.abc import Callable

from twinpath.errors import TwinpathError

_LOG = logging.getLogger(__name__)
#: Between looks, which cost next to nothing.
LOOK_S = 0.25
#: What answers that had begun have to end in, with an error.
LAST_WORDS_S = 1.0


async def end_with(check_health: Callable[[], None], end: Callable[[int], None] = os._exit) -> None:
    """Look until ``check_health`` raises; then end this process, with the reason in its log."""
    while True:
        try:
            check_health()
        except TwinpathError as error:
            _LOG.error("this replica ends: %s", error)
            await asyncio.sleep(LAST_WORDS_S)
            end(1)
            return
        await asyncio.sleep(LOOK_S)
