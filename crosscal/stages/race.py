"""`evaluate: race`: a few validation windows for every variant, more for those that are not clearly worse than another
at their compression level, and test windows and tasks for those that remain.

The measurements of a look are stored like those of any text, so a race is *replayed* from the store: it resumes where
it stopped, and another run of the same models reuses the results. The race itself uses no test text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from crosscal.evaluation import VALIDATION, QuestionSuite
from crosscal.evaluation.likelihood import Windows
from crosscal.evaluation.race import beaten, looks
from crosscal.report.rows import NOT_EVALUATED, LayerRow
from crosscal.stages.evaluate import EvaluationSet
from crosscal.stages.heldout_text import HeldOutText
from crosscal.stages.screen import level_of
from crosscal.variants import Variant

Seen = dict[str, list[float]]
"""Corpus -> log perplexity of each window measured, in the order of the text."""


@dataclass(frozen=True, eq=False)
class Race:
    """The validation windows of an evaluation set, look by look."""

    eval_set: EvaluationSet

    @functools.cached_property
    def parts(self) -> dict[HeldOutText, list[tuple[HeldOutText, list[int]]]]:
        """Text -> for each look, the windows that are new and their numbers."""
        found = {}
        for text in (text for text in self.eval_set.texts if text.split == VALIDATION):
            numbers = looks(len(text.tokens_SL))
            found[text] = [(HeldOutText(text.corpus, text.split, text.tokens_SL[each]), each) for each in numbers]
        return found

    @property
    def looks(self) -> list[int]:
        """The looks at which some text has new windows."""
        return [look for look in range(3) if any(parts[look][1] for parts in self.parts.values())]

    @functools.cached_property
    def apart(self) -> EvaluationSet:
        """The evaluation set restricted to these windows, with the new windows of each look as a text of their own."""
        every = [part for parts in self.parts.values() for part, numbers in parts if numbers]
        return dataclasses.replace(self.eval_set, texts=tuple(every), suite=QuestionSuite.load([]))

    def seen(self, weights: str, look: int) -> Seen | None:
        """Return a model's results on the windows up to a look, in the text's order; None if some were not measured."""
        found: Seen = {}
        for text, parts in self.parts.items():
            whole, of_text = _nll(self.eval_set, weights, text), dict[int, float]()
            for part, numbers in parts[: look + 1]:
                nll = [whole[number] for number in numbers] if whole else _nll(self.apart, weights, part)
                if numbers and nll is None:
                    return None
                of_text |= zip(numbers, nll or (), strict=True)
            found[text.corpus] = [of_text[number] for number in sorted(of_text)]
        return found

    def missing(self, weights: str, look: int | None) -> EvaluationSet | None:
        """Return `apart` restricted to what is to be measured: up to a look, or (None) all of the texts that a race has
        begun, but no text that was measured as a whole. None if nothing is."""
        texts: list[HeldOutText] = []
        for text, parts in self.parts.items():
            some = [part for part, numbers in (parts if look is None else parts[: look + 1]) if numbers]
            is_begun = look is not None or any(self.apart.stored(weights, part) for part in some)
            if is_begun and self.eval_set.stored(weights, text) is None:
                texts += some
        return dataclasses.replace(self.apart, texts=tuple(texts)) if texts else None

    def join(self, weights: str) -> None:
        """Store the measurement of each text whose windows were all measured."""
        for text, parts in self.parts.items():
            found = [self.apart.stored(weights, part) for part, numbers in parts if numbers]
            if self.eval_set.stored(weights, text) is not None or not all(found):
                continue
            measured = [one for each in found for one in each or ()]
            order = [number for _, numbers in parts for number in numbers]
            nll = dict(zip(order, (value for one in measured for value in one.window_nll or ()), strict=True))
            sums_S = torch.tensor([nll[i] for i in range(len(nll))]).double() * (text.tokens_SL.shape[1] - 1)
            windows = Windows(text.corpus, text.split, text.tokens_SL)
            self.eval_set.keep(weights, text, windows.result([sums_S], sum(one.seconds for one in measured)))


@dataclass(frozen=True)
class RaceExit:
    """Why a variant left the race, and its results so far."""

    why: str
    windows: Seen


@dataclass(frozen=True)
class RaceState:
    """The state of a race."""

    wanting: dict[str, int] = field(default_factory=dict)
    """Variant -> the look to measure it for."""
    left: dict[str, RaceExit] = field(default_factory=dict)


def replayed(
    race: Race,
    variants: Sequence[Variant],
    rows_of: Mapping[str, Sequence[LayerRow]],
    weights_of: Mapping[str, str],
    kept: Collection[str] = (),
) -> RaceState:
    """Replay the race as far as measurements are known. The variants in `kept` are compared but never leave."""
    levels: dict[object, dict[str, dict[int | None, str]]] = defaultdict(lambda: defaultdict(dict))
    for variant in variants:
        solved = [row for row in rows_of[variant.name] if not row.stays_dense]
        model, draw = variant.name.removesuffix(f"-s{variant.seed}"), variant.seed if variant.mixture else None
        levels[level_of(variant, solved)][model][draw] = variant.name
    found = RaceState()

    def seen(name: str, look: int) -> Seen | None:
        return race.seen(weights_of[name], look) if name in weights_of else None

    for field_of_level in levels.values():
        _run(race.looks, field_of_level, seen, kept, found)
    return found


def _run(
    looks_at: Sequence[int],
    seeds_of: Mapping[str, Mapping[int | None, str]],
    seen: Callable[[str, int], Seen | None],
    kept: Collection[str],
    found: RaceState,
) -> None:
    """Run one level, look by look, adding to `found`. `seeds_of`: model -> seed (None: needs no data) -> variant."""
    remaining, comparisons = dict(seeds_of), (len(seeds_of) - 1) * len(looks_at)
    for look in looks_at:
        if len(remaining) < 2:
            return
        known = {name: seen(name, look) for names in remaining.values() for name in names.values()}
        if any(each is None for each in known.values()):
            found.wanting.update({name: look for name, each in known.items() if each is None})
            return
        of_all = {name: each for name, each in known.items() if each is not None}
        corpora = list(next(iter(of_all.values())))
        windows = {
            model: {corpus: {seed: of_all[name][corpus] for seed, name in names.items()} for corpus in corpora}
            for model, names in remaining.items()
        }
        for model, by in beaten(windows, comparisons).items():
            if not any(name in kept for name in seeds_of[model].values()):
                for name in remaining.pop(model).values():
                    got = len(next(iter(of_all[name].values())))
                    why = f"{NOT_EVALUATED}left the race after {got} validation windows a corpus, {by.text}"
                    found.left[name] = RaceExit(why, of_all[name])


def _nll(eval_set: EvaluationSet, weights: str, text: HeldOutText) -> tuple[float, ...] | None:
    measured = eval_set.stored(weights, text) if len(text.tokens_SL) else None
    return measured[0].window_nll if measured else None
