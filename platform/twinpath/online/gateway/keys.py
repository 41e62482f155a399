"""API keys: a file of hashed keys that may change while it is in use.

A key reads ``tp_<id>_<secret>``. The secret has 256 random bits, so one round of SHA-256 keeps it
(a slow hash is for passwords, which can be guessed; it would cost every request milliseconds).
Nor would a pepper help: what cannot be guessed cannot be looked up in a table either.
"""

import datetime as dt
import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from twinpath.errors import AccessError, ConfigError, did_you_mean
from twinpath.online.gateway.args import LimitText
from twinpath.online.gateway.authentication import Principal
from twinpath.online.gateway.limiting import Limit
from twinpath.online.gateway.rules import Rule
from twinpath.online.gateway.watched import Watched
from twinpath.online.policy import Priority

_LOG = logging.getLogger(__name__)
_PREFIX = b"tp_"
#: How long the file is believed to be unchanged.
CHECK_S = 1.0
_CACHED = 10_000


class KeyRecord(BaseModel):
    """One key as it stands in the file, a line of JSON each. ``rate`` and ``quota`` are limits
    of its own; keys of one principal that state the same limit have it together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9]{4,32}$")
    principal: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    graphs: tuple[str, ...] = ("*",)
    priority: Literal["low", "normal", "high"] = "normal"
    expires: AwareDatetime | None = None
    rate: LimitText | None = None
    quota: LimitText | None = None
    #: Scope ``admin``: it opens the admin API of those graphs as well.
    admin: bool = False


def read_keys(path: Path) -> list[KeyRecord]:
    """The keys of a file. Raises ConfigError that names the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"API keys {str(path)!r} cannot be read: {error}") from None
    records: dict[str, KeyRecord] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = KeyRecord.model_validate_json(line)
        except ValidationError as error:
            detail = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, detail["loc"]))
            raise ConfigError(f"{path}, line {number}: {where}: {detail['msg']}") from None
        if record.id in records:
            raise ConfigError(f"{path}: key {record.id!r} stands there twice")
        records[record.id] = record
    return list(records.values())


def write_keys(path: Path, records: list[KeyRecord]) -> None:
    """Replace the file in one step, readable by its owner only."""
    lines = [
        record.model_dump_json(exclude_none=True, exclude={"admin"} if not record.admin else None)
        + "\n"
        for record in records
    ]
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
    rate: str | None = None,
    quota: str | None = None,
    *,
    admin: bool = False,
) -> tuple[str, KeyRecord]:
    """A key, which is not kept anywhere, and its record."""
    name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    record = KeyRecord(
        id=name, principal=principal, sha256=digest, graphs=graphs, priority=priority,
        expires=expires, rate=rate, quota=quota, admin=admin,
    )  # fmt: skip
    return f"tp_{name}_{secret}", record


def replace_key(
    records: list[KeyRecord], key_id: str, old_until: dt.datetime
) -> tuple[str, list[KeyRecord]]:
    """A new key in the place of another, which is accepted until ``old_until`` at most, and the
    records with both. Raises ConfigError for an unknown one."""
    old = next((record for record in records if record.id == key_id), None)
    if old is None:
        known = did_you_mean(key_id, [record.id for record in records])
        raise ConfigError(f"no key {key_id!r}.{known}")
    key, new = new_key(
        old.principal, old.graphs, old.priority, old.expires, old.rate, old.quota, admin=old.admin
    )
    ends = old_until if old.expires is None else min(old.expires, old_until)
    ending = old.model_copy(update={"expires": ends})
    return key, [*(ending if record is old else record for record in records), new]


class ApiKeys:
    """Authenticator for the keys of a file. A file that breaks while in use leaves the keys as
    they were, with an error in the log. ``limit_of(text, quota)`` makes the rule for limits that
    keys have of their own."""

    def __init__(self, path: Path, limit_of: Callable[[str, bool], Rule] | None = None) -> None:
        self._path = path
        self._limit_of = limit_of or (lambda text, quota: Limit(text, quota=quota))
        #: By text and whether it is a quota; they outlive a change of the file, with their counts.
        self._limits: dict[tuple[str, bool], Rule] = {}
        self._records: dict[bytes, tuple[bytes, Principal]] = {}
        self._known: dict[bytes, Principal] = {}
        self._watched, self._look_s = Watched(path), 0.0
        self._load()

    def reads(self, credentials: bytes) -> bool:
        """See `Authenticator`."""
        return credentials.startswith(_PREFIX)

    def principal(self, credentials: bytes) -> Principal:
        """See `Authenticator`."""
        now_s = time.monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + CHECK_S
            self._reload_if_changed()
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

    def _reload_if_changed(self) -> None:
        if not self._watched.changed(0.0):
            return
        try:
            self._load()
        except ConfigError as error:
            _LOG.error("API keys stay as they were: %s", error)

    def _load(self) -> None:
        records = read_keys(self._path)
        self._records = {
            record.id.encode(): (record.sha256.encode(), self._principal(record))
            for record in records
        }
        self._known.clear()

    def _principal(self, record: KeyRecord) -> Principal:
        expires_s = None if record.expires is None else record.expires.timestamp()
        return Principal(
            record.principal,
            frozenset(record.graphs),
            expires_s,
            Priority[record.priority.upper()],
            tuple(
                self._limit(text, quota)
                for text, quota in ((record.rate, False), (record.quota, True))
                if text is not None
            ),
            record.admin,
        )

    def _limit(self, text: str, quota: bool) -> Rule:
        found = self._limits.get((text, quota))
        if found is None:
            found = self._limits[text, quota] = self._limit_of(text, quota)
        return found
