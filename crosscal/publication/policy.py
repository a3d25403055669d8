"""Whether a new model takes the place of the published one.

    perplexity(candidate) <= perplexity(published) · (1 + tolerance)    on the domain, and
    perplexity(candidate) <= perplexity(published) · (1 + guard)        on every guarded corpus,

both models measured on the same windows. The first model of a domain is published as it is, there being nothing that
it could be worse than; it only has to have been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    domain: str
    tolerance: float = 0.0
    """As a fraction of the published model's perplexity."""
    guard: dict[str, float] = field(default_factory=dict)
    """Corpus → the same for that corpus."""


@dataclass(frozen=True)
class Decision:
    is_published: bool
    reason: str


def decide(rule: Rule, candidate: Mapping[str, float], published: Mapping[str, float] | None) -> Decision:
    """`candidate` and `published`: corpus → perplexity. A number that is missing or not finite never passes."""
    asked = {rule.domain: rule.tolerance, **{name: most for name, most in rule.guard.items() if name != rule.domain}}
    unmeasured = [name for name in asked if not math.isfinite(candidate.get(name, math.nan))]
    if unmeasured:
        return Decision(False, f"not measured on {', '.join(unmeasured)}")
    if published is None:
        return Decision(True, f"the first model of this domain: {_numbers(asked, candidate)}")
    worse = [name for name, most in asked.items() if not candidate[name] <= published[name] * (1 + most)]
    if worse:
        told = (f"{_compared(name, candidate, published)}, at most {asked[name]:.1%} is allowed" for name in worse)
        return Decision(False, f"worse: {'; '.join(told)}")
    return Decision(True, "; ".join(_compared(name, candidate, published) for name in asked))


def _numbers(names: Mapping[str, float], candidate: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {candidate[name]:.4g}" for name in names)


def _compared(name: str, candidate: Mapping[str, float], published: Mapping[str, float]) -> str:
    change = candidate[name] / published[name] - 1
    return f"{name} {candidate[name]:.4g} against {published[name]:.4g} ({change:+.1%})"
