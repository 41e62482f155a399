"""The version of a model that a request asks for, wherever a protocol has a place for it.

In the path, ``/versions/<version>`` (Open Inference Protocol, TensorFlow Serving); in gRPC
``model_version``; in any protocol the header, or the gRPC metadata, ``x-model-version``.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from twinpath.errors import MalformedBodyError

T = TypeVar("T")
HEADER = b"x-model-version"
_PLACE = re.compile(r"/versions/(\d+)(?=[/:])")
_PLACE_RAW = re.compile(rb"/versions/\d+(?=[/:])")


def asked(path: str, headers: Mapping[bytes, bytes]) -> str | None:
    """The version that a path or header names; the path wins. Raises MalformedBodyError for a
    header that is no version."""
    if "/versions/" in path:
        found = _PLACE.search(path)
        if found is not None:
            return found[1]
    given = headers.get(HEADER)
    if not given:
        return None
    if not given.isdigit() or len(given) > 18:
        raise MalformedBodyError(
            f"{HEADER.decode()} {given.decode('latin-1')[:40]!r}: expected a version such as 3"
        )
    return given.decode()


def at(codecs: Mapping[str, T], path: str) -> T | None:
    """What is at a path, or at the same one without its version."""
    found = codecs.get(path)
    if found is None and "/versions/" in path:
        return codecs.get(_PLACE.sub("", path, count=1))
    return found


def at_raw(codecs: Mapping[bytes, T], url: bytes) -> T | None:
    """The same for a path as it came over the wire."""
    found = codecs.get(url)
    if found is None and b"/versions/" in url:
        return codecs.get(_PLACE_RAW.sub(b"", url, count=1))
    return found
