"""The audit log of rollouts: in the registry, beside the version that it is about, and in a file.

A line is a tag of the challenger's version, so what was decided and why outlives every process of
ours. The file is a copy for those who collect logs.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinpath.rollout.audit import encode

_LOG = logging.getLogger(__name__)
#: Prefix of tags of a version, one for each line; the rest is a hash of the line's id.
PREFIX = "twinpath.audit."
#: Characters of a line in a tag; findings beyond it are left out, the worst come first.
LONGEST = 4_900


def key_of(line: Mapping[str, Any]) -> str:
    """The tag of a line. The same event has the same one, however often it is written."""
    return PREFIX + hashlib.sha256(str(line["id"]).encode()).hexdigest()[:16]


def text_of(line: Mapping[str, Any]) -> str:
    """The line for a tag, with as many findings as a tag holds."""
    kept = dict(line)
    while len(text := encode(kept).rstrip("\n")) > LONGEST and kept.get("evidence"):
        kept["evidence"] = kept["evidence"][:-1]
    return text


def lines_of(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """The lines among the tags of a version, oldest first; what is no line is passed over."""
    found = []
    for key, text in tags.items():
        if not key.startswith(PREFIX):
            continue
        try:
            found.append(json.loads(text))
        except ValueError:
            _LOG.warning("tag %s is no audit line", key)
    return sorted(found, key=lambda line: str(line.get("time", "")))


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add the line to the file. A file that cannot be written is said in the log, and stops
    nothing: the registry has the line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as sink:
            sink.write(encode(dict(line)))
    except OSError as error:
        _LOG.error("audit log %s: %s", path, error)
