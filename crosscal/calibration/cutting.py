"""Windows cut from a stream of documents. Shapes: L tokens in a window."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import numpy as np


def cut(
    documents: Iterable[Sequence[int]], length: int, begin: int | None = None
) -> Generator[np.ndarray, None, np.ndarray]:
    """Join documents and cut them into windows of `length` tokens, int32 [L]; return the tokens left over.

    With `begin`, every window consists of that token and `length - 1` tokens of the stream; if the stream itself
    continues with `begin`, because a document starts there, it is not duplicated. No other token is dropped or
    repeated. Documents are consumed lazily.
    """
    rest = np.empty(0, dtype=np.int32)
    for document in documents:
        windows, rest = cut_off(np.concatenate([rest, np.array(document, dtype=np.int32)]), length, begin)
        yield from windows
    return rest


def cut_off(tokens: np.ndarray, length: int, begin: int | None) -> tuple[list[np.ndarray], np.ndarray]:
    """Return all complete windows from the front of the tokens, and the tokens left over."""
    taken = length if begin is None else length - 1
    front = np.array([] if begin is None else [begin], dtype=np.int32)
    windows, start = [], 0
    while len(tokens) - (first := _skip(tokens, start, begin)) >= taken:
        start = first + taken
        windows.append(np.concatenate([front, tokens[first:start]]))
    return windows, tokens[start:]


def _skip(tokens: np.ndarray, start: int, begin: int | None) -> int:
    """Return the first position from `start` on whose token is not `begin`."""
    while start < len(tokens) and tokens[start] == begin:
        start += 1
    return start
