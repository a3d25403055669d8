"""How small gzip makes a text, and a text with another behind it: compression as a measure of likeness."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

LEVEL = 6
"""gzip's own default."""
_GZIP = 31
IMPLEMENTATION = f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
"""What the sizes depend on: another implementation of the same format finds other matches."""


def compressed_bytes(data: bytes) -> int:
    """len(gzip(data))."""
    return compressed_bytes_with(data, [b""])[0]


def compressed_bytes_with(data: bytes, others: Sequence[bytes]) -> list[int]:
    """len(gzip(data + other)) for each of the others, `data` compressed once."""
    begun = zlib.compressobj(LEVEL, wbits=_GZIP)
    head = len(begun.compress(data))
    found = []
    for other in others:
        one = begun.copy()
        found.append(head + len(one.compress(other)) + len(one.flush()))
    return found
