"""Mixtures of corpora that the entries of a plan ask for: given weights, or a search for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crosscal.errors import PlanError, UsageError
from crosscal.plan import CompressionPlan
from crosscal.plan.search import AUTO
from crosscal.plan.settings import OF_A_MIXTURE
from crosscal.search import line, rule, simplex
from crosscal.statistics import Mixture

GENERAL = "general"
RULE = 2
"""Version of the rule that picks one of the tried mixtures; bump it when the rule changes."""


@dataclass(frozen=True)
class Search:
    """A search for mixture weights: minimise Π_k E_k^(v_k) up to a tolerance, E_k being the mean relative loss of the
    solution on held-out text of corpus k. With `general_within`: the best weight for the domain within that bound on
    general perplexity."""

    exponents: tuple[tuple[str, float], ...]
    """Corpus -> v, sorted by name; they sum to 1."""
    general_within: float | None = None
    """Allowed excess of general perplexity over that of general-only calibration, as a fraction."""
    validation: tuple[Any, ...] = ()
    """Window settings of the validation text that the rule's perplexities are measured on: they enter the key."""

    @classmethod
    def of(cls, exponents: Mapping[str, float], **rule: Any) -> Search:
        """Normalise the exponents to sum 1. Raises `UsageError` for fewer than two corpora."""
        if len(exponents) < 2:
            raise UsageError(
                "a mixture can be found of two corpora or more",
                got=", ".join(exponents) or "none",
                do="For example `domain: legal` with `alpha: auto`.",
            )
        total = sum(exponents.values())
        return cls(tuple(sorted((name, exponent / total) for name, exponent in exponents.items())), **rule)

    @property
    def corpora(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.exponents)

    @property
    def domain(self) -> str:
        """The corpus, of two, that alpha is the weight of: the one not called `general`, or else the second by name."""
        first, second = self.corpora
        return first if second == GENERAL else second

    @property
    def start(self) -> Mixture:
        """The mixture with the exponents as weights, used until the search is over."""
        return Mixture.of(dict(self.exponents))

    @property
    def name(self) -> str:
        """The search's part of a variant's name."""
        rule = "" if self.general_within is None else f"-within{self.general_within:g}"
        if len(self.corpora) == 2 and GENERAL in self.corpora and self._is_even:
            return f"{self.domain}-{AUTO}{rule}"
        least = min(exponent for _, exponent in self.exponents)
        weights = {name: "" if self._is_even else f"{exponent / least:.4g}" for name, exponent in self.exponents}
        return "-".join([*(f"{name}{weight}" for name, weight in weights.items()), AUTO])

    @property
    def text(self) -> str:
        """Description of the search for rows and reports."""
        if self.general_within is not None:
            return f"auto, general perplexity within {self.general_within:.3g} of general-only on validation text"
        weights = ", ".join(f"{name} {exponent:.3g}" for name, exponent in self.exponents)
        return "auto, smallest geometric mean of held-out losses" + ("" if self._is_even else f" ({weights})")

    @property
    def cost(self) -> str:
        """Upper bound of the work that the search takes, for `plan check`."""
        if self.general_within is not None:
            models = f"the dense model, general-only and {rule.MOST_EVALUATED} more at most"
            return f"{len(line.FIRST)} mixtures solved; {models} evaluated on validation windows"
        solves = line.MOST_SOLVES if len(self.corpora) == 2 else simplex.MOST_SOLVES
        return f"{solves} mixtures solved at most, none evaluated"

    @property
    def key(self) -> list[Any]:
        """Everything that the choice depends on, besides the recipe and the data."""
        return [AUTO, RULE, self.exponents, self.general_within, self.validation]

    @property
    def _is_even(self) -> bool:
        return len({round(exponent, 9) for _, exponent in self.exponents}) == 1


Asked = Mixture | Search


def asked_mixtures(plan: CompressionPlan, said: Mapping[str, Any], where: str) -> Iterator[tuple[str | None, Asked]]:
    """Yield (domain, mixture) for every combination of `domain` and `alpha`, or for every `mixture`."""
    if said["mixture"] is not None:
        yield from ((None, _weighed(plan, weights)) for weights in said["mixture"])
        return
    if said["domain"] is None:
        only = GENERAL if GENERAL in plan.corpora else next(iter(plan.corpora)) if len(plan.corpora) == 1 else None
        if only is None:
            raise PlanError(
                "which corpus to calibrate on?", where=where, do="Add `domain` and `alpha`, or a `mixture`."
            )
        if any(isinstance(alpha, str | dict) for alpha in said["alpha"]):
            raise PlanError("`alpha: auto` is the weight of a domain", where=where, do="Add `domain`.")
        yield None, Mixture.of({only: 1.0})
        return
    for domain, alpha in itertools.product(said["domain"], said["alpha"]):
        if isinstance(alpha, str | dict):
            yield domain, _of_two(plan, domain, alpha, where)
            continue
        if alpha < 1 and GENERAL not in plan.corpora:
            raise PlanError(
                "alpha below 1 needs a corpus named `general`",
                where=where,
                got=f"alpha {alpha:g}",
                do="Add it, or set alpha: 1, or give a `mixture`.",
            )
        yield domain, Mixture.alpha(domain, alpha, GENERAL)


def own_mixtures(
    plan: CompressionPlan, part: Mapping[str, Any], domain: str | None, where: str
) -> Iterator[Mixture | None]:
    """Yield the own mixtures of a recipe's step, whose weights must be given; None if it uses the recipe's mixture."""
    if not any(name in part for name in OF_A_MIXTURE):
        yield None
        return
    said = {"alpha": [0.5], "domain": [domain] if domain else None, "mixture": None, **part}
    as_lists = {name: value if value is None or isinstance(value, list) else [value] for name, value in said.items()}
    for _, mixture in asked_mixtures(plan, as_lists, where):
        if isinstance(mixture, Search):
            raise PlanError(
                "a step's own mixture is given, not found",
                where=where,
                got=AUTO,
                do="Write `auto` beside `steps`, or give the step's weights.",
            )
        yield mixture


def mixture_name(mixture: Asked) -> str:
    """Return the mixture's part of a variant's name."""
    if isinstance(mixture, Search):
        return mixture.name
    if len(mixture.weights) == 1:
        return mixture.corpora[0]
    if len(mixture.weights) == 2 and GENERAL in mixture.corpora:
        domain = next(name for name in mixture.corpora if name != GENERAL)
        return f"{domain}-a{mixture.as_dict()[domain]:g}"
    return "-".join(f"{name}{weight:g}" for name, weight in mixture.weights)


def _weighed(plan: CompressionPlan, weights: Any) -> Asked:
    if weights == AUTO:
        return Search.of(dict.fromkeys(plan.corpora, 1.0))
    if isinstance(weights.get(AUTO), Mapping):
        return Search.of(weights[AUTO])
    return Mixture.of(weights)


def _of_two(plan: CompressionPlan, domain: str, alpha: Any, where: str) -> Search:
    if GENERAL not in plan.corpora or domain == GENERAL:
        raise PlanError(
            "`alpha: auto` weighs a domain against a corpus named `general`",
            where=where,
            got=f"domain {domain}, corpora {', '.join(plan.corpora)}",
            do="Add it, or name the corpora in `mixture: {auto: {…: 1, …: 1}}`.",
        )
    within = alpha[AUTO]["general_within"] if isinstance(alpha, Mapping) else None
    if within is None:
        return Search.of({GENERAL: 1.0, domain: 1.0})
    for corpus in (GENERAL, domain):
        if corpus not in plan.perplexity_corpora:
            raise PlanError(
                f"a rule on perplexity needs that on {corpus!r}",
                where=where,
                got=f"perplexity is measured on {', '.join(plan.perplexity_corpora) or 'nothing'}",
                do="Add it to `evaluate.perplexity`, as a corpus of documents.",
            )
    evaluate, calibration = plan.evaluate, plan.calibration
    measured_on = (evaluate.length or calibration.length, calibration.begin_token, calibration.plain_text)
    return Search.of({GENERAL: 1.0, domain: 1.0}, general_within=within, validation=measured_on)
