"""Early elimination of candidates by their validation windows (racing)."""

from __future__ import annotations

import random

import pytest

from crosscal.evaluation.comparison import LEVEL
from crosscal.evaluation.race import FEWEST, beaten, looks


@pytest.mark.parametrize("windows", [2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 64])
def test_looks_are_all_windows_once_and_few_at_first(windows: int) -> None:
    found = looks(windows)
    assert sorted(number for part in found for number in part) == list(range(windows))
    assert len(found) == 3
    assert len(found[0]) >= min(FEWEST, windows)
    if windows >= 16:
        assert len(found[0]) == -(-windows // 4)
        assert max(b - a for a, b in zip(found[0], found[0][1:], strict=False)) == 4, "spread over the whole text"


def noisy(chance: random.Random, hard: list[float], *means: float) -> dict[int | None, list[float]]:
    """Return seed -> values of all windows, with the seed's mean."""
    return {seed: [mean + each + chance.gauss(0, 0.02) for each in hard] for seed, mean in enumerate(means)}


def test_whoever_is_worse_on_every_corpus_leaves_and_the_front_stays() -> None:
    chance = random.Random(0)
    hard = [chance.gauss(3, 1) for _ in range(16)]
    front = {"g": (1.0, 1.5), "m": (1.1, 1.2), "d": (1.5, 1.0)}
    worse = {"bad": (1.2, 1.6), "worst": (2.0, 2.0)}
    models = {
        name: {corpus: noisy(chance, hard, mean) for corpus, mean in zip(("general", "legal"), means, strict=True)}
        for name, means in (front | worse).items()
    }
    found = beaten(models, comparisons=12)
    assert set(found) == set(worse)
    assert found["bad"].by in ("g", "m")
    assert set(found["bad"].differences) == {"general", "legal"}
    assert beaten({name: each for name, each in models.items() if name != "m"}, 12).keys() == set(worse)
    tie = {"one": models["g"], "two": models["g"]}
    assert beaten(tie, 1) == {}


def test_seeds_leave_together_and_what_cannot_be_paired_stays() -> None:
    chance = random.Random(1)
    hard = [chance.gauss(3, 1) for _ in range(8)]
    good = {"general": noisy(chance, hard, 1.0, 1.01)}
    bad = {"general": noisy(chance, hard, 1.5, 1.52)}
    assert set(beaten({"good": good, "bad": bad}, 3)) == {"bad"}
    one_luckily = {"general": {0: bad["general"][0], 1: good["general"][0]}}
    assert beaten({"good": good, "lucky": one_luckily}, 3) == {}, "seeds differ by more than windows do"
    shorter = {"general": {seed: each[:4] for seed, each in bad["general"].items()}}
    assert beaten({"good": good, "bad": shorter}, 3) == {}
    assert beaten({"good": good, "bad": {**bad, "legal": bad["general"]}}, 3) == {}


@pytest.mark.parametrize(("counted", "is_kept"), [(True, True), (False, False)])
def test_looking_often_at_many_misleads_no_more_often_than_the_level(counted: bool, is_kept: bool) -> None:
    """Equally good models on one corpus, the worst case: every elimination is an error. Only a rule that corrects for
    the number of looks and models keeps the level."""
    chance, models, trials, lost = random.Random(2), 5, 60, 0
    parts = looks(16)
    for _ in range(trials):
        nll = {name: [chance.gauss(3, 0.1) for _ in range(16)] for name in map(str, range(models))}
        order, remaining = [], dict(nll)
        for part in parts:
            order += part
            seen = {name: {"general": {0: [own[i] for i in order]}} for name, own in remaining.items()}
            for name in beaten(seen, (models - 1) * len(parts) if counted else 1):
                del remaining[name]
        lost += models - len(remaining)
    assert (lost / (trials * models) <= LEVEL) == is_kept
