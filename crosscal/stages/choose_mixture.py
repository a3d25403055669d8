"""Finding the mixture of a variant that leaves it open: what to solve next, and what is taken in the end.

A search is replayed from the store, where every candidate's losses stand under a key of all that they depend on. So
whatever was killed goes on where it was, and a search that is over costs a few small reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosscal.mixtures import Search
from crosscal.search.geometric_mean import geometric_mean
from crosscal.search.simplex import Weights, best_weights, weights_to_try
from crosscal.stages.candidates import Candidate, losses_of
from crosscal.stages.compress import Workshop
from crosscal.statistics import Mixture
from crosscal.variants import Variant


@dataclass(frozen=True)
class Tried:
    """One mixture of a search, and what its solution loses."""

    weights: dict[str, float]
    losses: dict[str, float]
    """Corpus -> mean relative loss on its held-out text."""
    objective: float
    """The geometric mean of the losses."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """Corpus -> on validation windows; empty where no model was made of it."""


@dataclass(frozen=True)
class Choice:
    """What a search came to."""

    variant: str
    found_by: str
    exponents: dict[str, float]
    weights: dict[str, float]
    tried: list[Tried]
    """In the order of the first corpus's weight, downwards: on a line from it to the second."""
    reason: str

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def candidate(variant: Variant, weights: Weights) -> Candidate:
    """The variant on a mixture that its search tries."""
    search = variant.search
    assert search is not None
    mixture = Mixture.of(dict(zip(search.corpora, weights, strict=True)))
    name = f"{variant.name}.{'-'.join(f'{weight:.4g}' for weight in weights)}"
    return Candidate(dataclasses.replace(variant.with_mixture(mixture), name=name), search.corpora)


def candidates_wanted(shop: Workshop, variants: Sequence[Variant]) -> list[tuple[Variant, Weights]]:
    """What is to be solved next for variants whose mixture is open; nothing once all searches are over."""
    return [(variant, weights) for variant in variants for weights in _replayed(shop, variant)[1]]


def choice(shop: Workshop, variant: Variant) -> Choice:
    """The mixture of the smallest geometric mean, once the search is over."""
    search = variant.search
    assert search is not None
    tried, wanted = _replayed(shop, variant)
    assert not wanted, "its candidates are solved first"
    exponents = [exponent for _, exponent in search.exponents]
    best = best_weights(tried, exponents)
    points = [_tried(search, weights, losses) for weights, losses in sorted(tried.items(), reverse=True)]
    mixture = Mixture.of(dict(zip(search.corpora, best, strict=True)))
    return Choice(variant.name, search.text, dict(search.exponents), mixture.as_dict(), points, _reason(tried, search))


def _replayed(shop: Workshop, variant: Variant) -> tuple[dict[Weights, tuple[float, ...]], list[Weights]]:
    """(what was tried, what is to be tried next and is not known)."""
    search = variant.search
    assert search is not None
    exponents = [exponent for _, exponent in search.exponents]
    tried: dict[Weights, tuple[float, ...]] = {}
    while wanted := weights_to_try(tried, exponents):
        known = {weights: losses_of(shop, candidate(variant, weights)) for weights in wanted}
        unknown = [weights for weights, losses in known.items() if losses is None]
        if unknown:
            return tried, unknown
        tried |= {w: tuple(losses[name] for name in search.corpora) for w, losses in known.items() if losses}
    return tried, []


def _tried(search: Search, weights: Weights, losses: Sequence[float]) -> Tried:
    of_corpora = dict(zip(search.corpora, losses, strict=True))
    exponents = [exponent for _, exponent in search.exponents]
    given = dict(zip(search.corpora, weights, strict=True))
    return Tried(given, of_corpora, geometric_mean(losses, exponents))


def _reason(tried: Mapping[Weights, Sequence[float]], search: Search) -> str:
    return f"the smallest geometric mean of {len(tried)} mixtures solved, none of them evaluated"
