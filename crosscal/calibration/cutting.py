"""Windows out of a stream of documents. Shapes: L tokens in a window."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import numpy as np


def cut(
    documents: Iterable[Sequence[int]], length: int, begin: int | None = None
) -> Generator[np.ndarray, None, np.ndarray]:
    """Join documents and cut them into windows of `length` tokens, int32 [L]; returns what fills none.

    With `begin` every window consists of that token and `length - 1` of the stream; where the stream itself has the
    token next, because a document begins there, it is not taken twice. No other token is left out or repeated.
    Documents are asked for only when they are needed.
    """
    taken = length if begin is None else length - 1
    front = np.array([] if begin is None else [begin], dtype=np.int32)
    rest = np.empty(0, dtype=np.int32)
    for document in documents:
        rest = np.concatenate([rest, np.array(document, dtype=np.int32)])
        start = 0
        while len(rest) - (first := _skip(rest, start, begin)) >= taken:
            start = first + taken
            yield np.concatenate([front, rest[first:start]])
        rest = rest[start:]
    return rest


def _skip(tokens: np.ndarray, start: int, begin: int | None) -> int:
    """The first place from `start` on that does not hold `begin`."""
    while start < len(tokens) and tokens[start] == begin:
        start += 1
    return start
