"""Which mixture to take for each domain, under a rule that the report states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosscal.evaluation.summaries import pareto_front
from crosscal.report.groups import GENERAL, Group, Number

SLACK = 0.10
RULE = (
    "At each level of compression: the lowest domain perplexity among the variants on the Pareto front of general "
    f"against domain perplexity whose general perplexity is at most {SLACK:.0%} above the lowest at that level."
)


@dataclass(frozen=True)
class Best:
    """The variant to take for a domain at a level, beside the same method calibrated on the general corpus alone."""

    domain: str
    level: str
    group: Group
    general_only: Group | None

    @property
    def general(self) -> Number:
        return _perplexity(self.group, GENERAL)

    @property
    def special(self) -> Number:
        return _perplexity(self.group, self.domain)

    @property
    def change(self) -> float | None:
        """Relative change of the domain perplexity against general-only calibration; negative is better."""
        if self.general_only is None or self.general_only is self.group:
            return None
        return self.special.value / _perplexity(self.general_only, self.domain).value - 1


def domains_of(groups: Sequence[Group]) -> list[str]:
    """The corpora that some mixture gives a weight beside the general one, in order of appearance."""
    return list(dict.fromkeys(domain for group in groups for domain in sorted(group.domains)))


def best_variants(groups: Sequence[Group], domain: str) -> list[Best]:
    """One choice for each level at which the domain and the general perplexity were measured."""
    levels: dict[str, list[Group]] = {}
    for group in groups:
        if not group.is_dense and group.domains <= {domain} and group.perplexity(GENERAL) and group.perplexity(domain):
            levels.setdefault(group.level, []).append(group)
    return [_best(found, domain, level) for level, found in levels.items()]


def _best(groups: list[Group], domain: str, level: str) -> Best:
    points = [(_perplexity(group, GENERAL).value, _perplexity(group, domain).value) for group in groups]
    bound = min(general for general, _ in points) * (1 + SLACK)
    allowed = [index for index in pareto_front(points) if points[index][0] <= bound]
    chosen = groups[min(allowed, key=lambda index: points[index][1])]
    peers = [group for group in groups if not group.domains and group.flavour == chosen.flavour]
    return Best(domain, level, chosen, peers[0] if peers else None)


def _perplexity(group: Group, corpus: str) -> Number:
    number = group.perplexity(corpus)
    assert number is not None, "groups without both perplexities are left out before"
    return number
