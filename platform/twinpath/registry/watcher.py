"""Asks the registry again and again what should serve, with jitter, so that replicas which were
started together do not ask together.

MLflow's webhooks (`online.rollouts.webhook`) come in addition: only a server sends them, and one
that is lost is not repeated.
"""

import logging
import random
import threading
import time
from collections.abc import Callable

from twinpath.errors import TwinpathError
from twinpath.registry.client import Registry
from twinpath.registry.reference import ModelState

_LOG = logging.getLogger(__name__)


class Watcher:
    """Reads a model's state every ``poll_s`` seconds, give or take a fifth, in a thread.

    ``seen`` is told of every reading and when it began (`time.monotonic`). ``problem`` is the
    registry's last error, None after a reading that went well; ``seen_s`` is when that was.
    """

    def __init__(
        self,
        registry: Registry,
        name: str,
        seen: Callable[[ModelState, float], None],
        *,
        poll_s: float = 1.0,
        jitter: float = 0.2,
    ) -> None:
        self._registry, self._name, self._seen = registry, name, seen
        self._poll_s, self._jitter = poll_s, jitter
        self.problem: str | None = None
        self.seen_s: float | None = None
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=self._watch, daemon=True, name=f"twinpath-watch-{name}"
        )

    def read(self) -> None:
        """Ask once, now. Raises RegistryError, UnknownModelError."""
        began_s = time.monotonic()
        try:
            state = self._registry.state(self._name)
        except TwinpathError as error:
            self.problem = error.message
            raise
        self.problem, self.seen_s = None, time.monotonic()
        self._seen(state, began_s)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def ask_now(self) -> None:
        """Ask at once instead of when it is due."""
        self._wake.set()

    def close(self) -> None:
        """Stop asking."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _over(self) -> bool:
        return self._ended

    def _watch(self) -> None:
        while not self._over():
            wait_s = self._poll_s * random.uniform(1 - self._jitter, 1 + self._jitter)
            self._wake.wait(wait_s)
            self._wake.clear()
            if self._over():
                return
            before = self.problem
            try:
                self.read()
            except TwinpathError as error:
                if before is None:
                    _LOG.warning("model %s: what serves goes on: %s", self._name, error)
            except Exception:
                _LOG.exception("model %s: what the registry said could not be followed", self._name)
            else:
                if before is not None:
                    _LOG.info("model %s: the registry answers again", self._name)
