"""Packing of units of tokens into windows: pieces of whole turns, nearest sums, and each unit in one window."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain, combinations, pairwise

import pytest

from crosscal.calibration.packing import Remainder, fill, nearest_sum, whole_turns


@pytest.mark.parametrize("seed", range(100))
def test_pieces_of_turns_are_all_of_them(seed: int) -> None:
    chance = random.Random(seed)
    turns = [[number] * chance.randint(1, 30) for number in range(chance.randrange(12))]
    room = chance.randint(2, 40)
    pieces = [list(piece) for piece in whole_turns(turns, room)]
    assert list(chain(*pieces)) == list(chain(*turns))
    assert all(0 < len(piece) <= room for piece in pieces)
    for one, two in pairwise(pieces):
        assert one[-1] != two[0] or len(turns[one[-1]]) > room, "only a turn that is too long is cut"
        assert len(one) + len(turns[two[0]]) > room, "as many turns as fit"


@pytest.mark.parametrize("seed", range(200))
def test_the_sum_is_the_nearest_and_of_the_first(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 40) for _ in range(chance.randrange(10))]
    wanted = chance.randrange(80)

    def best(count: int) -> int:
        sums = (sum(some) for size in range(count + 1) for some in combinations(lengths[:count], size))
        return max(each for each in sums if each <= wanted)

    chosen = nearest_sum(lengths, wanted)
    found = sum(lengths[place] for place in chosen)
    assert found == best(len(lengths))
    if found == wanted and chosen:
        assert best(max(chosen)) < wanted, "none of those behind is needed"


@pytest.mark.parametrize("seed", range(100))
def test_every_unit_stands_once_in_windows_of_any_length(seed: int) -> None:
    chance = random.Random(seed)
    length, begin = chance.randint(4, 60), chance.choice([None, 0])
    room = length - (begin is not None)
    units = [
        tuple(range(1000 * number, 1000 * number + chance.randint(1, room)))
        for number in range(1, chance.randint(2, 40))
    ]
    filling = fill([], length, None, begin, Remainder((), tuple(units)))
    seen: list[int] = []
    rest = None
    while rest is None:
        try:
            window = next(filling)
        except StopIteration as end:
            rest = end.value
            continue
        tokens = window.tokens_L.tolist()
        assert len(tokens) == length
        kept = tokens[: length - window.repeated][begin is not None :]
        assert len(kept) == window.taken
        assert tokens[: begin is not None] == [begin] * (begin is not None)
        behind = tokens[length - window.repeated :]
        assert not behind or any(list(unit[: len(behind)]) == behind for unit in units)
        seen += kept
    assert Counter(seen) + Counter(chain(*rest.chats)) == Counter(chain(*units))
    starts = {unit[0] for unit in units}
    assert all(place == 0 or token == seen[place - 1] + 1 or token in starts for place, token in enumerate(seen))
    assert rest.tokens < length
