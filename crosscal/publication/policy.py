"""Decide which of a run's models, if any, replaces the published model of its domain.

Every comparison uses validation windows, paired differences and one rule (`crosscal.evaluation.comparison`), with k the
number of candidates. A candidate may replace the published model if it is shown to be

    at most the guard worse than the dense model, and than the published one,     on every guarded corpus, and
    better than the published one, by `min_gain` or more,                         on the domain;

with a `tolerance` it only has to be shown to be at most that much worse there. A model that is not distinguishable from
the published one therefore never replaces it. The first model of a domain is compared only with the dense model; dense
itself violates no condition, and neither does a candidate equal to it. Of the candidates that meet the conditions,
`crosscal.evaluation.choice` selects the one to publish: the one with the lowest perplexity on general text among those
not distinguishable from the best on the domain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from crosscal.evaluation.choice import choose
from crosscal.evaluation.comparison import change_text, excess, is_distinguishable, log_difference
from crosscal.evaluation.summaries import PairedDifference

Windows = Mapping[str, Sequence[float]]
"""Corpus → log perplexity of each validation window, in the same order for every model."""
DENSE, PUBLISHED = "dense", "published"
NAMES = {DENSE: "dense", PUBLISHED: "the published model"}


@dataclass(frozen=True)
class PublishRule:
    """Bounds on changes of perplexity, under which a candidate replaces the published model of a domain."""

    domain: str
    tolerance: float = 0.0
    """Allowed loss on the domain, as a fraction of the published model's perplexity."""
    guard: dict[str, float] = field(default_factory=dict)
    """Corpus → allowed loss on it, as a fraction of the dense and of the published model's perplexity."""
    min_gain: float = 0.0
    """Least gain on the domain, as a fraction of the published model's perplexity. Not together with a tolerance."""
    general: str = "general"
    """The corpus that decides among candidates not distinguishable on the domain, if it is measured."""


@dataclass(frozen=True)
class Decision:
    is_published: bool
    reason: str
    variant: str | None = None
    """The variant that is published, would have been, or came nearest; None if none was measured."""
    changes: dict[str, dict[str, PairedDifference]] = field(default_factory=dict)
    """For this variant: corpus → the model compared with → difference of log perplexity on validation windows."""


@dataclass(frozen=True)
class _Condition:
    """The condition that a candidate is shown to be at most `most` worse than another model on a corpus."""

    corpus: str
    other: str
    difference: PairedDifference | None
    most: float
    comparisons: int
    is_guard: bool

    @property
    def excess(self) -> float:
        return math.inf if self.difference is None else excess(self.difference, self.most, self.comparisons)

    @property
    def holds(self) -> bool:
        """Equality satisfies a bound on losses, but is not a gain."""
        return self.excess < 0 or (self.excess == 0 and (self.is_guard or self.most > 0))

    def text(self) -> str:
        if self.difference is None:
            return f"{self.corpus} not measured on the same validation windows as {NAMES[self.other]}"
        change = f"{change_text(self.difference)} than {NAMES[self.other]}"
        if self.is_guard or self.most > 0:
            return f"{self.corpus} {change}, {self._bound(self.difference)}"
        if not is_distinguishable(self.difference, self.comparisons):
            return f"{self.corpus} not distinguishable from {NAMES[self.other]} ({change_text(self.difference)})"
        is_too_little = self.difference.mean < 0 and not self.holds
        return f"{self.corpus} {change}" + f", not shown to be {-self.most:.1%} or more (min_gain)" * is_too_little

    def _bound(self, difference: PairedDifference) -> str:
        if self.holds or difference.mean > math.log1p(self.most):
            return f"at most {self.most:.1%} is allowed"
        return f"which {difference.n} windows do not show to be within {self.most:.1%}"


def decide(rule: PublishRule, candidates: Mapping[str, Windows], dense: Windows, published: Windows | None) -> Decision:
    """Decide which candidate to publish, if any. `published` is None if there is no model to compare with."""
    asked = list(dict.fromkeys([rule.domain, *rule.guard]))
    if lacking := [name for name in asked if len(dense.get(name, ())) < 2]:
        why = "fewer than two validation windows, and test windows decide nothing"
        return Decision(False, f"nothing can be decided: {', '.join(lacking)} has {why}")
    looked_at = {name: each for name, each in candidates.items() if all(each.get(corpus) for corpus in asked)}
    if not looked_at:
        return Decision(False, f"no candidate was measured on validation windows of {', '.join(asked)}")
    measured = {  # the others were eliminated in a race on the same windows: they count among the comparisons
        name: each for name, each in looked_at.items() if all(len(each[c]) == len(dense[c]) for c in asked)
    }
    if not measured:
        return Decision(False, f"{', '.join(looked_at)} not measured on the same validation windows as dense")
    found = {name: list(_conditions(rule, each, dense, published, len(looked_at))) for name, each in measured.items()}
    guarded = [name for name, each in found.items() if all(one.holds for one in each if one.is_guard)]
    moving = [name for name in guarded if all(one.holds for one in found[name])]
    if guarded:
        variant, why = _chosen(rule, {name: measured[name] for name in moving or guarded})
        said = "; ".join(one.text() for one in found[variant] if moving or not one.is_guard)
    else:
        variant = min(found, key=lambda name: _most_excess(found[name]))
        broken = "; ".join(one.text() for one in found[variant] if one.is_guard and not one.holds)
        why, said = "", f"{variant} does not keep the guard: {broken}"
        if len(found) > 1:
            said = f"none of {len(found)} candidates keeps the guard; nearest comes {variant}: {broken}"
    if published is None and moving:
        first = f"{rule.domain} {_against(measured[variant], dense, rule.domain)} than dense"
        said = "; ".join(filter(None, (f"the first model of this domain: {first}", said)))
    reason = f"{said}{why}"
    return Decision(bool(moving), reason, variant, _changes(measured[variant], dense, published))


def _conditions(
    rule: PublishRule, candidate: Windows, dense: Windows, published: Windows | None, comparisons: int
) -> Iterator[_Condition]:
    others = {DENSE: dense} | ({} if published is None else {PUBLISHED: published})
    if published is not None:
        difference = _difference(candidate, published, rule.domain)
        most = rule.tolerance or -rule.min_gain
        yield _Condition(rule.domain, PUBLISHED, difference, most, comparisons, is_guard=False)
    for corpus, most in rule.guard.items():
        for other, windows in others.items():
            yield _Condition(corpus, other, _difference(candidate, windows, corpus), most, comparisons, is_guard=True)


def _chosen(rule: PublishRule, candidates: Mapping[str, Windows]) -> tuple[str, str]:
    """Return the candidate to publish, and the reason for choosing it."""
    names = list(candidates)
    has_general = all(candidates[name].get(rule.general) for name in names)

    def point(name: str) -> tuple[float, float]:
        general = fmean(candidates[name][rule.general]) if has_general else 0.0
        return general, fmean(candidates[name][rule.domain])

    found = choose(
        [point(name) for name in names],
        lambda one, other: _difference(candidates[names[one]], candidates[names[other]], rule.domain),
    )
    chosen, lowest = names[found.chosen], names[found.lowest]
    if len(names) == 1:
        return chosen, ""
    if chosen == lowest:
        return chosen, f"; {chosen} is the best on {rule.domain} of {len(names)} candidates"
    difference = _difference(candidates[chosen], candidates[lowest], rule.domain)
    apart = change_text(difference) if difference else ""
    return chosen, f"; {chosen} is not distinguishable on {rule.domain} from {lowest}, the best ({apart}), and cheaper"


def _changes(candidate: Windows, dense: Windows, published: Windows | None) -> dict[str, dict[str, PairedDifference]]:
    others = {DENSE: dense, PUBLISHED: published or {}}
    return {
        corpus: {name: known for name, each in others.items() if (known := _difference(candidate, each, corpus))}
        for corpus in candidate
    }


def _difference(one: Windows, other: Windows, corpus: str) -> PairedDifference | None:
    return log_difference({None: one[corpus]}, {None: other[corpus]}) if corpus in one and corpus in other else None


def _against(one: Windows, other: Windows, corpus: str) -> str:
    difference = _difference(one, other, corpus)
    return change_text(difference) if difference else "not compared"


def _most_excess(conditions: Sequence[_Condition]) -> float:
    return max(one.excess for one in conditions if one.is_guard)
