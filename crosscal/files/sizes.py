"""gzip sizes of a text, and of a text followed by another: compression as a measure of similarity."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

LEVEL = 6
"""gzip's own default."""
_GZIP = 31
IMPLEMENTATION = f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
"""The sizes depend on it: another implementation of the same format finds other matches."""


def compressed_bytes(data: bytes) -> int:
    """Return len(gzip(data))."""
    return compressed_bytes_with(data, [b""])[0]


def compressed_bytes_with(data: bytes, others: Sequence[bytes]) -> list[int]:
    """Return len(gzip(data + other)) for each of `others`; `data` is compressed only once."""
    begun = zlib.compressobj(LEVEL, wbits=_GZIP)
    head = len(begun.compress(data))
    found = []
    for other in others:
        one = begun.copy()
        found.append(head + len(one.compress(other)) + len(one.flush()))
    return found
