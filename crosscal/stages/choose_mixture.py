"""Search for the mixture of a variant that leaves it open: what to solve next, and the final choice.

A search is replayed from the store, which keeps every candidate's losses under a key of all that they depend on. An
interrupted search therefore resumes where it stopped, and a finished one costs a few small reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosscal.mixtures import Search
from crosscal.search import line
from crosscal.search.geometric_mean import geometric_mean
from crosscal.search.simplex import ALIKE, Weights, best_weights, weights_to_try
from crosscal.stages.candidates import Candidate, losses_of
from crosscal.stages.compress import RunContext
from crosscal.statistics import Mixture
from crosscal.variants import Variant

Losses = dict[Weights, tuple[float, ...]]
"""Weights -> mean relative losses, both in the order of the search's corpora."""


@dataclass(frozen=True)
class TriedMixture:
    """One mixture of a search, and the losses of its solution."""

    weights: dict[str, float]
    losses: dict[str, float]
    """Corpus -> mean relative loss on its held-out text."""
    objective: float
    """The geometric mean of the losses."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """Corpus -> perplexity on validation windows; empty if no model was evaluated."""


@dataclass(frozen=True)
class MixtureChoice:
    """The result of a search."""

    variant: str
    found_by: str
    exponents: dict[str, float]
    weights: dict[str, float]
    tried: list[TriedMixture]
    """Sorted by the last corpus's weight: for two corpora, from all of the first to all of the second."""
    reason: str

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def candidate(variant: Variant, weights: Weights) -> Candidate:
    """Return the variant with a mixture that its search tries."""
    search = search_of(variant)
    name = f"{variant.name}.{'-'.join(f'{weight:.4g}' for weight in weights)}"
    mixture = mixture_of(search, weights)
    return Candidate(dataclasses.replace(variant.with_mixture(mixture), name=name), search.corpora)


def candidates_wanted(context: RunContext, variants: Sequence[Variant]) -> list[tuple[Variant, Weights]]:
    """Return what to solve next for variants whose mixture is open; empty once all searches are over."""
    return [(variant, weights) for variant in variants for weights in replayed(context, variant)[1]]


def choice(context: RunContext, variant: Variant) -> MixtureChoice:
    """Return the mixture of the smallest geometric mean of losses, or one alike, once the search is over."""
    search, (tried, wanted) = search_of(variant), replayed(context, variant)
    assert not wanted, "its candidates are solved first"
    best = best_weights(tried, exponents_of(search))
    reason = (
        f"of {len(tried)} mixtures that were solved, and those whose geometric mean is within {ALIKE:.0%} of the "
        "smallest, the nearest to the corpora's own weights; none was evaluated"
    )
    return choice_of(variant, best, tried, {}, reason)


def choice_of(
    variant: Variant, weights: Weights, tried: Losses, perplexity: Mapping[Weights, Mapping[str, float]], reason: str
) -> MixtureChoice:
    search = search_of(variant)
    points = [
        TriedMixture(
            dict(zip(search.corpora, each, strict=True)),
            dict(zip(search.corpora, losses, strict=True)),
            geometric_mean(losses, exponents_of(search)),
            dict(perplexity.get(each, {})),
        )
        for each, losses in sorted(tried.items(), key=lambda item: item[0][::-1])
    ]
    found = mixture_of(search, weights).as_dict()
    return MixtureChoice(variant.name, search.text, dict(search.exponents), found, points, reason)


def replayed(context: RunContext, variant: Variant) -> tuple[Losses, list[Weights]]:
    """Return (the losses tried so far, the mixtures to solve next)."""
    search, tried = search_of(variant), dict[Weights, tuple[float, ...]]()
    while wanted := _weights_to_try(search, tried):
        known = {weights: losses_of(context, candidate(variant, weights)) for weights in wanted}
        unknown = [weights for weights, losses in known.items() if losses is None]
        if unknown:
            return tried, unknown
        tried |= {w: tuple(losses[name] for name in search.corpora) for w, losses in known.items() if losses}
    return tried, []


def search_of(variant: Variant) -> Search:
    assert variant.search is not None, "only of variants whose mixture is open"
    return variant.search


def exponents_of(search: Search) -> list[float]:
    return [exponent for _, exponent in search.exponents]


def mixture_of(search: Search, weights: Weights) -> Mixture:
    return Mixture.of(dict(zip(search.corpora, weights, strict=True)))


def _weights_to_try(search: Search, tried: Losses) -> list[Weights]:
    if search.general_within is None:
        return weights_to_try(tried, exponents_of(search))
    return [each for weight in line.FIRST if (each := (1.0 - weight, weight)) not in tried]
