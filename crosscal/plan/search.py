"""How a plan asks for a mixture that is to be found: `auto` where a weight or weights could stand.

alpha: [0, 0.5, auto]
alpha: {auto: {general_within: 0.02}}
mixture: auto
mixture: {auto: {general: 1, biomedical: 1, legal: 2}}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

AUTO = "auto"
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Rule(BaseModel):
    """What the weight that is found has to keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    general_within: float = Field(gt=0, le=1)
    """How much above general-only calibration's the perplexity on the general corpus may be, as a fraction, on
    validation windows; of what keeps that, the lowest perplexity on the domain is taken."""


class RuledAlpha(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    auto: Rule


class WeighedMixture(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    auto: dict[Name, Annotated[float, Field(gt=0)]] = Field(min_length=2)
    """Corpus -> exponent of its loss in the geometric mean that is made small: 2 counts twice."""


def _kind_of_alpha(value: Any) -> str:
    return "rule" if isinstance(value, dict | RuledAlpha) else "auto" if isinstance(value, str) else "number"


def _kind_of_mixture(value: Any) -> str:
    is_found = isinstance(value, WeighedMixture) or (isinstance(value, dict) and isinstance(value.get(AUTO), dict))
    return "exponents" if is_found else "auto" if isinstance(value, str) else "weights"


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
KINDS = ("number", "rule", "weights", "exponents")
"""What pydantic puts into the place of an error, and no plan says. (`auto` is a word of plans.)"""
