"""Mixture syntax of a plan: weights, or `auto` to have them found by a search.

alpha: [0, 0.5, auto]
alpha: {auto: {general_within: 0.02}}
mixture: auto
mixture: {auto: {general: 1, biomedical: 1, legal: 2}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from crosscal.plan.settings import EMPTY, as_axis
from crosscal.plan.sources import Name

AUTO = "auto"


class MixtureRule(BaseModel):
    """Constraint on the weight that is found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    general_within: float = Field(gt=0, le=1)
    """Allowed excess of perplexity on the general corpus over general-only calibration, as a fraction, on validation
    windows; of the weights within it, that of the lowest perplexity on the domain is taken."""


class RuledAlpha(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    auto: MixtureRule


class WeighedMixture(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    auto: dict[Name, Annotated[float, Field(gt=0)]] = Field(min_length=2)
    """Corpus -> exponent of its loss in the geometric mean that is minimised: 2 counts twice."""


def _kind_of_alpha(value: Any) -> str:
    return "rule" if isinstance(value, dict | RuledAlpha) else "auto" if isinstance(value, str) else "number"


def _kind_of_mixture(value: Any) -> str:
    is_searched_mixture = isinstance(value, WeighedMixture) or (
        isinstance(value, dict) and isinstance(value.get(AUTO), dict)
    )
    return "exponents" if is_searched_mixture else "auto" if isinstance(value, str) else "weights"


Alpha = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")]
    | Annotated[Literal["auto"], Tag("auto")]
    | Annotated[RuledAlpha, Tag("rule")],
    Discriminator(_kind_of_alpha),
]
Weights = Annotated[
    Annotated[dict[Name, float], Tag("weights")]
    | Annotated[Literal["auto"], Tag("auto")]
    | Annotated[WeighedMixture, Tag("exponents")],
    Discriminator(_kind_of_mixture),
]


def as_mixtures(value: Any) -> Any:
    """Return a single mixture as a list of one, anything else unchanged. Raises `ValueError` for an empty list."""
    if value == []:
        raise ValueError(EMPTY)
    return [value] if isinstance(value, dict | str) else value


def corpora_named(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the corpora that an entry of `compress` and its steps name."""
    for part in (entry, *(entry.get("steps") or [])):
        domain, mixture = part.get("domain"), part.get("mixture")
        yield from () if domain is None else as_axis(domain)
        for weights in () if mixture is None else as_mixtures(mixture):
            named = weights.get(AUTO) if isinstance(weights, dict) else {}
            yield from named if isinstance(named, dict) else weights
