"""A request's body in the Open Inference Protocol: inflated, and its JSON apart from tensors."""

import zlib
from typing import Any

import orjson

from twinpath.errors import BodyTooLargeError, EmptyBodyError, MalformedBodyError

HEADER_LENGTH = b"inference-header-content-length"
#: A compressed body may grow to this many bytes.
_MAX_INFLATED_BYTES = 64 * 1024 * 1024


def length_of(header_length: bytes) -> int | None:
    """What the header says; None for what is no length of any body."""
    return int(header_length) if header_length.isdigit() and len(header_length) < 16 else None


def document_of(
    body: bytes, header_length: bytes | None
) -> tuple[dict[str, Any], memoryview | None]:
    """The JSON of a request, and the bytes behind it if it has binary tensors."""
    tail = None
    if header_length is not None:
        size = length_of(header_length)
        if size is None or size > len(body):
            raise MalformedBodyError(
                f"{HEADER_LENGTH.decode()} {header_length.decode('latin-1')[:20]!r}: expected the "
                f"length of the JSON part of a body of {len(body)} bytes"
            )
        tail = memoryview(body)[size:]
        body = body[:size]
    if not body:
        raise EmptyBodyError('the body is empty: send {"inputs": [...]}')
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MalformedBodyError(f'expected {{"inputs": [...]}}, got {str(document)[:80]!r}')
    return document, tail


def inflated(encoding: bytes, body: bytes) -> bytes:
    """A gzip or deflate body, never more than the limit of it."""
    windows = {b"gzip": 31, b"deflate": 15, b"identity": None}
    kind = encoding.strip().lower()
    if kind not in windows:
        raise MalformedBodyError(
            f"content-encoding {encoding.decode('latin-1')[:40]!r}: expected gzip or deflate"
        )
    window = windows[kind]
    if window is None:
        return body
    inflater = zlib.decompressobj(window)
    try:
        whole = inflater.decompress(body, _MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise MalformedBodyError(f"the body is not {kind.decode()}: {error}") from None
    if inflater.unconsumed_tail:
        raise BodyTooLargeError(f"the body inflates to more than {_MAX_INFLATED_BYTES} bytes")
    if not inflater.eof:
        raise MalformedBodyError(f"the body is not whole: its {kind.decode()} data end too early")
    return whole
