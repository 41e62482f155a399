"""API keys: a file of hashed keys that may change while it is in use.

A key reads ``tp_<id>_<secret>``. The secret has 256 random bits, so one round of SHA-256 keeps it
(a slow hash is for passwords, which can be guessed; it would cost every request milliseconds).
"""

import contextlib
import datetime as dt
import hashlib
import hmac
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from twinpath.errors import AccessError, ConfigError
from twinpath.online.gateway.authentication import Principal
from twinpath.online.policy import Priority

_LOG = logging.getLogger(__name__)
_PREFIX = b"tp_"
#: How long the file is believed to be unchanged.
CHECK_S = 1.0
_CACHED = 10_000


class KeyRecord(BaseModel):
    """One key as it stands in the file, a line of JSON each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9]{4,32}$")
    principal: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    graphs: tuple[str, ...] = ("*",)
    priority: Literal["low", "normal", "high"] = "normal"
    expires: dt.datetime | None = None


def read_keys(path: Path) -> list[KeyRecord]:
    """The keys of a file. Raises ConfigError that names the line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"API keys {str(path)!r} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(TypeAdapter(KeyRecord).validate_json(line))
        except ValidationError as error:
            detail = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, detail["loc"]))
            raise ConfigError(f"{path}, line {number}: {where}: {detail['msg']}") from None
    ids = [record.id for record in records]
    twice = next((i for i in ids if ids.count(i) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: key {twice!r} stands there twice")
    return records


def write_keys(path: Path, records: list[KeyRecord]) -> None:
    """Replace the file in one step, readable by its owner only."""
    lines = [record.model_dump_json(exclude_none=True) + "\n" for record in records]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as sink:
        sink.writelines(lines)
    beside.replace(path)


def new_key(
    principal: str,
    graphs: tuple[str, ...] = ("*",),
    priority: Literal["low", "normal", "high"] = "normal",
    expires: dt.datetime | None = None,
) -> tuple[str, KeyRecord]:
    """A key, which is not kept anywhere, and its record."""
    name, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    record = KeyRecord(
        id=name, principal=principal, sha256=digest, graphs=graphs, priority=priority,
        expires=expires,
    )  # fmt: skip
    return f"tp_{name}_{secret}", record


class ApiKeys:
    """Authenticator for the keys of a file. A file that breaks while in use leaves the keys as
    they were, with an error in the log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[bytes, tuple[bytes, Principal]] = {}
        self._known: dict[bytes, Principal] = {}
        self._checked_s = time.monotonic()
        self._state = self._stat()
        self._load()

    def reads(self, credentials: bytes) -> bool:
        """See `Authenticator`."""
        return credentials.startswith(_PREFIX)

    def principal(self, credentials: bytes) -> Principal:
        """See `Authenticator`."""
        now_s = time.monotonic()
        if now_s - self._checked_s > CHECK_S:
            self._checked_s = now_s
            self._reload()
        found = self._known.get(credentials)
        if found is None:
            found = self._verified(credentials)
            if len(self._known) >= _CACHED:
                self._known.clear()
            self._known[credentials] = found
        if found.expires_s is not None and time.time() >= found.expires_s:
            raise AccessError("this API key has expired: ask for a new one")
        return found

    def _verified(self, credentials: bytes) -> Principal:
        name, _, secret = credentials[len(_PREFIX) :].partition(b"_")
        wanted, principal = self._records.get(name, (b"0" * 64, None))
        given = hashlib.sha256(secret).hexdigest().encode()
        # Unknown ids are compared too, so that time does not tell which ids there are.
        if not hmac.compare_digest(given, wanted) or principal is None:
            raise AccessError("this API key is not known")
        return principal

    def _stat(self) -> tuple[int, int, int] | None:
        with contextlib.suppress(OSError):
            found = self._path.stat()
            return found.st_ino, found.st_mtime_ns, found.st_size
        return None

    def _reload(self) -> None:
        state = self._stat()
        if state == self._state:
            return
        self._state = state
        try:
            self._load()
        except ConfigError as error:
            _LOG.error("API keys stay as they were: %s", error)

    def _load(self) -> None:
        records = read_keys(self._path)
        self._records = {
            record.id.encode(): (record.sha256.encode(), _principal(record)) for record in records
        }
        self._known.clear()


def _principal(record: KeyRecord) -> Principal:
    expires_s = None if record.expires is None else record.expires.timestamp()
    priority = Priority[record.priority.upper()]
    return Principal(record.principal, frozenset(record.graphs), expires_s, priority)
