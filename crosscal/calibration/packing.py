"""Windows of whole conversations. Shapes: L tokens in a window.

Of a text any L tokens make a window; a conversation is taken whole. Each window begins with the conversation that has
waited longest, and of the next ones (`LOOKAHEAD`) those are put behind it that fill it exactly, found as a sum of
their lengths. Where none do, the window ends with the beginning of one that stands whole in a later window: cut off at
its end, where no token before it is the worse for it. So no window begins inside a turn, and every
conversation stands in one of them once, whole.

A conversation that is longer than a window is first cut between turns, and a turn only where it alone is longer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crosscal.calibration.chats import RenderedChat
from crosscal.calibration.cutting import cut_off

LOOKAHEAD = 256
"""Conversations that wait to be chosen from, as long as they hold less than `MOST_WINDOWS` windows of tokens."""
MOST_WINDOWS = 128

Unit = Sequence[int]
"""Tokens that stay together: a conversation, or whole turns of one that is too long."""


@dataclass(frozen=True)
class Rest:
    """What of a stream fills no window yet."""

    text: tuple[int, ...] = ()
    chats: tuple[tuple[int, ...], ...] = ()
    """Conversation by conversation."""

    @property
    def tokens(self) -> int:
        return len(self.text) + sum(map(len, self.chats))


@dataclass(frozen=True, eq=False)
class Window:
    tokens_L: np.ndarray
    taken: int
    """Tokens of the stream that it is the first to hold: neither a beginning added nor what comes again."""

    repeated: int = 0
    """Tokens at its end that come again, in the window that holds their conversation whole."""


def fill(
    documents: Iterable[Sequence[int] | RenderedChat],
    length: int,
    begin: int | None,
    chat_begin: int | None,
    rest: Rest = Rest(),
    most: int | None = None,
) -> Generator[Window, None, Rest]:
    """Windows of `length` tokens out of texts (see `cutting.cut`) and conversations, which share no window; returns
    what fills none. Documents are asked for only when they are needed. `most`: how many windows will be taken, if that
    is known; the last conversations are put together better where all of them will be."""
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
    return Rest(tuple(text.tolist()), tuple(map(tuple, packer.units)))


class Packer:
    """Conversations that wait, in their order, and the windows made of them."""

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
        """The next; `longest`: those that are hardest to place come first, where nothing is left to wait for."""
        first, *others = sorted(self.units, key=len, reverse=True) if longest else self.units
        added = self._added(first)
        wanted = self._length - added - len(first)
        chosen = nearest_sum([len(unit) for unit in others], wanted)
        self.units = [unit for place, unit in enumerate(others) if place not in chosen]
        parts = [[self._begin] * added, first, *(others[place] for place in sorted(chosen))]
        repeated = wanted - sum(len(others[place]) for place in chosen)
        if repeated:
            parts.append(self.units[0][:repeated])  # which is longer, or it would have been chosen
        self.tokens -= self._length - added - repeated
        tokens_L = np.concatenate([np.array(part, dtype=np.int32) for part in parts])
        return Window(tokens_L, self._length - added - repeated, repeated)

    def _added(self, first: Unit) -> int:
        return int(self._begin is not None and first[0] != self._begin)


def whole_turns(turns: Iterable[Unit], room: int) -> Iterator[Unit]:
    """Pieces of at most `room` tokens: as many turns as fit, and only of a longer turn a part."""
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
    """Places of those lengths whose sum is the largest that is at most `wanted`, out of the first ones that reach it.

    Bit s of `reached[n]` says whether some of the first n have the sum s.
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
