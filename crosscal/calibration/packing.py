"""Windows of whole conversations (packing). Shapes: L tokens in a window.

Any L consecutive tokens of a text make a window, but conversations are kept whole. Each window begins with the
conversation that has waited longest, followed by those of the waiting ones (see `LOOKAHEAD`) whose lengths best fill
the remaining space (subset sum). Any gap is filled with the beginning of a conversation that a later window contains
whole: it is truncated at the end of the window, where that affects no earlier token. So no window begins inside a turn,
and every conversation is whole in exactly one window.

A conversation longer than a window is first cut between turns; a turn is cut only if it alone is longer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crosscal.calibration.chats import RenderedChat
from crosscal.calibration.cutting import cut_off

LOOKAHEAD = 256
"""Conversations collected before a window is filled, unless they already have `MOST_WINDOWS` windows of tokens."""
MOST_WINDOWS = 128

Unit = Sequence[int]
"""Tokens that stay together: a conversation, or whole turns of one that is too long."""


@dataclass(frozen=True)
class Remainder:
    """Tokens of a stream that do not fill a window yet."""

    text: tuple[int, ...] = ()
    chats: tuple[tuple[int, ...], ...] = ()
    """One tuple per conversation, or per piece of a long one."""

    @property
    def tokens(self) -> int:
        return len(self.text) + sum(map(len, self.chats))


@dataclass(frozen=True, eq=False)
class Window:
    tokens_L: np.ndarray
    taken: int
    """Tokens that it takes from the stream: without an added begin token and without `repeated`."""

    repeated: int = 0
    """Tokens at its end that appear again in the later window that contains their conversation whole."""


def fill(
    documents: Iterable[Sequence[int] | RenderedChat],
    length: int,
    begin: int | None,
    chat_begin: int | None,
    rest: Remainder = Remainder(),
    most: int | None = None,
) -> Generator[Window, None, Remainder]:
    """Yield windows of `length` tokens from texts (see `cutting.cut`) and conversations, which share no window; return
    the tokens left over. Documents are consumed lazily. `most`: the number of windows that will be taken, if known; if
    that includes all remaining conversations, the longest are placed first, which packs them better."""
    text, packer, made = np.array(rest.text, dtype=np.int32), Packer(length, chat_begin, rest.chats), 0
    for document in documents:
        if isinstance(document, RenderedChat):
            packer.add(document)
            while packer.has_choice:
                made += 1
                yield packer.window()
        else:
            windows, text = cut_off(np.concatenate([text, np.array(document, dtype=np.int32)]), length, begin)
            made += len(windows)
            yield from (Window(tokens_L, length - (begin is not None)) for tokens_L in windows)
    while packer.has_window:
        made += 1
        yield packer.window(longest=most is None or packer.tokens <= (most - made) * length)
    return Remainder(tuple(text.tolist()), tuple(map(tuple, packer.units)))


class Packer:
    """Holds waiting conversations, in order, and packs them into windows."""

    def __init__(self, length: int, begin: int | None, units: Iterable[Unit] = ()) -> None:
        self.units: list[Unit] = list(units)
        self._length, self._begin = length, begin
        self.tokens = sum(map(len, self.units))

    def add(self, chat: RenderedChat) -> None:
        room = self._length - (self._begin is not None)
        fits = len(chat.ids) <= room + (chat.ids[:1] == [self._begin])
        self.units += [chat.ids] if fits and chat.ids else whole_turns(chat.by_turn(), room)
        self.tokens += len(chat.ids)

    @property
    def has_window(self) -> bool:
        return bool(self.units) and self.tokens + min(map(self._added, self.units)) >= self._length

    @property
    def has_choice(self) -> bool:
        waits = len(self.units) < LOOKAHEAD and self.tokens < MOST_WINDOWS * self._length
        return self.has_window and not waits

    def window(self, *, longest: bool = False) -> Window:
        """Return the next window. `longest`: place the longest units first, for when no more documents will come."""
        first, *others = sorted(self.units, key=len, reverse=True) if longest else self.units
        added = self._added(first)
        wanted = self._length - added - len(first)
        chosen = nearest_sum([len(unit) for unit in others], wanted)
        self.units = [unit for place, unit in enumerate(others) if place not in chosen]
        parts = [[self._begin] * added, first, *(others[place] for place in sorted(chosen))]
        repeated = wanted - sum(len(others[place]) for place in chosen)
        if repeated:
            parts.append(self.units[0][:repeated])  # it is longer than that, or it would have been chosen
        self.tokens -= self._length - added - repeated
        tokens_L = np.concatenate([np.array(part, dtype=np.int32) for part in parts])
        return Window(tokens_L, self._length - added - repeated, repeated)

    def _added(self, first: Unit) -> int:
        return int(self._begin is not None and first[0] != self._begin)


def whole_turns(turns: Iterable[Unit], room: int) -> Iterator[Unit]:
    """Yield pieces of at most `room` tokens: as many whole turns as fit. Only a turn longer than `room` is cut."""
    piece: list[int] = []
    for turn in turns:
        if piece and len(piece) + len(turn) > room:
            yield piece
            piece = []
        piece = [*piece, *turn]
        while len(piece) > room:
            yield piece[:room]
            piece = piece[room:]
    if piece:
        yield piece


def nearest_sum(lengths: Sequence[int], wanted: int) -> set[int]:
    """Return the indices of lengths with the largest sum that is at most `wanted` (subset sum).

    Lengths after the first n that reach `wanted` are not considered. Bit s of `reached[n]` is set if a subset of the
    first n lengths has the sum s.
    """
    reached, sums = [1], (1 << (wanted + 1)) - 1
    for length in lengths:
        if reached[-1] >> wanted & 1:
            break
        reached.append((reached[-1] | reached[-1] << length) & sums)
    left, chosen = reached[-1].bit_length() - 1, set[int]()
    for place in reversed(range(len(reached) - 1)):
        if not reached[place] >> left & 1:
            chosen.add(place)
            left -= lengths[place]
    return chosen
