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
    rest = np.empty(0, dtype=np.int32)
    for document in documents:
        windows, rest = cut_off(np.concatenate([rest, np.array(document, dtype=np.int32)]), length, begin)
        yield from windows
    return rest


def cut_off(tokens: np.ndarray, length: int, begin: int | None) -> tuple[list[np.ndarray], np.ndarray]:
    """All windows that stand at the front of the tokens, and what is behind them."""
    taken = length if begin is None else length - 1
    front = np.array([] if begin is None else [begin], dtype=np.int32)
    windows, start = [], 0
    while len(tokens) - (first := _skip(tokens, start, begin)) >= taken:
        start = first + taken
        windows.append(np.concatenate([front, tokens[first:start]]))
    return windows, tokens[start:]


def _skip(tokens: np.ndarray, start: int, begin: int | None) -> int:
    """The first place from `start` on that does not hold `begin`."""
    while start < len(tokens) and tokens[start] == begin:
        start += 1
    return start
