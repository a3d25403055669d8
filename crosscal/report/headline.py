"""Which variant to take for each domain, under a rule that the report states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from crosscal.evaluation.summaries import pareto_front
from crosscal.report.groups import GENERAL, TEST, Group
from crosscal.report.left_dense import SLACK as DENSE_SLACK
from crosscal.report.left_dense import compared
from crosscal.report.numbers import Number, number_text
from crosscal.report.pairing import STANDARD_ERRORS, is_told_apart, log_difference

SLACK = 0.01
"""How far above the lowest perplexity counts as alike where differences cannot be paired."""
RULE = (
    "At each level of compression, of the variants that no other beats in both: the lowest general perplexity among "
    "those that cannot be told from the lowest domain perplexity, their mean difference of log perplexity over the "
    f"same windows being at most {STANDARD_ERRORS:g} standard errors (or, where the windows' numbers were not kept, "
    f"their perplexity within {SLACK:.0%}). Variants with over {DENSE_SLACK:.0%} more of their parameters left "
    "dense than others of their level are not compared."
)


@dataclass(frozen=True)
class Best:
    """The variant to take for a domain at a level, and what it was chosen among."""

    domain: str
    level: str
    split: str
    group: Group
    lowest: Group
    """That of the lowest domain perplexity; `group` itself, or one that it cannot be told from."""
    compared: int
    """How many variants of the level were compared."""
    alike: int
    """How many cannot be told from `lowest`, itself included."""
    windows: int | None
    """Over which differences were paired; None where they could not be."""
    cheaper: Group | None
    """The next on the front, worse on the domain and better in general text."""
    general_only: Group | None
    """The same method at the same level, calibrated on the general corpus alone."""

    @property
    def general(self) -> Number | None:
        return self.group.perplexity(GENERAL)

    @property
    def special(self) -> Number | None:
        return self.group.perplexity(self.domain)

    @property
    def change(self) -> float | None:
        """Relative change of the domain perplexity against general-only calibration; negative is better."""
        before = self.general_only.perplexity(self.domain) if self.general_only else None
        if self.special is None or before is None or self.general_only is self.group:
            return None
        return self.special.value / before.value - 1


def domains_of(groups: Sequence[Group]) -> list[str]:
    """The corpora beside the general one that some mixture weighs and that have a perplexity, in order of appearance.

    Text that is only there to calibrate on (what the model wrote itself, random tokens) is no domain.
    """
    measured = {name for group in groups for name, _, metric in group.numbers if metric == "perplexity"}
    weighed = dict.fromkeys(domain for group in groups for domain in sorted(group.domains))
    return [domain for domain in weighed if domain in measured]


def best_variants(groups: Sequence[Group], domain: str, split: str = TEST) -> list[Best]:
    """One choice for each level by the perplexities of one split, whatever a variant was calibrated on.

    Where no variant has a general perplexity there is nothing to weigh, and the lowest domain perplexity is taken.
    """
    measured = [group for group in groups if not group.is_dense and group.perplexity(domain, split)]
    weighed = [group for group in measured if group.perplexity(GENERAL, split)] or measured
    return [_best(found, domain, level, split) for level, found in compared(weighed).items()]


def _best(groups: Sequence[Group], domain: str, level: str, split: str) -> Best:
    front = [groups[index] for index in pareto_front([_point(group, domain, split) for group in groups])]
    lowest = min(front, key=lambda group: _value(group, domain, split))
    differences = {group.name: log_difference(group, lowest, domain, split) for group in front}
    alike = [
        group
        for group in front
        if (not is_told_apart(known) if (known := differences[group.name]) else _is_near(group, lowest, domain, split))
    ]
    chosen = min(alike, key=lambda group: _point(group, domain, split))
    cheaper = [group for group in front if _general(group, split) < _general(chosen, split)]
    paired = [known.n for known in differences.values() if known]
    peers = [group for group in groups if group.mixture == {GENERAL: 1.0} and group.flavour == chosen.flavour]
    return Best(
        domain,
        level,
        split,
        chosen,
        lowest,
        len(groups),
        len(alike),
        paired[0] if len(paired) == len(differences) else None,
        cheaper[-1] if cheaper else None,
        peers[0] if peers else None,
    )


def sentence(best: Best, kept: Collection[str], folder: str = "models") -> str:
    """What to take and why, with the path of its model if it was kept (`kept`: the variants whose models were)."""
    group, several = best.group, len(best.group.variants) > 1
    path = f"{folder}/{group.variants[0]}" + (f", one of {len(group.variants)} seeds" * several)
    where = f" ({path})" if group.variants[0] in kept else " (its model was not kept)"
    numbers = [f"{best.domain} perplexity {number_text(best.special, 'perplexity')}"]
    if best.general:
        numbers.append(f"general {number_text(best.general, 'perplexity')}")
    dense = f"; {group.left_dense.text} stay dense" if group.left_dense.matrices else ""
    at = f" at {best.level}" if best.level else ""
    said = f"{', '.join(numbers)}; {_reason(best)}{_price(best)}{dense}"
    return f"For {best.domain}{at} take {group.name}{where}: {said}."


def sentences(groups: Sequence[Group], kept: Collection[str], folder: str) -> list[str]:
    """`sentence` for every domain and level."""
    return [sentence(best, kept, folder) for domain in domains_of(groups) for best in best_variants(groups, domain)]


def _reason(best: Best) -> str:
    lowest = f"the lowest perplexity on {best.domain}"
    if best.compared == 1:
        return "the only variant to compare at this level"
    among = f" of {best.compared} variants"
    if best.general is None:
        return f"{lowest}{among}, general text not being measured"
    if best.windows is None:
        unpaired = "differences could not be paired, for the windows' numbers were not kept"
        return f"the lowest general perplexity of those within {SLACK:.0%} of {lowest}{among} ({unpaired})"
    if best.group is not best.lowest:
        less = _change(best.group, best.lowest, GENERAL, best.split)
        return (
            f"over the same {best.windows} windows not told from {best.lowest.name}, which has {lowest}{among}, "
            f"and with {-less:.2g} % lower general perplexity"
        )
    told = "" if best.cheaper is None else f"told over the same {best.windows} windows from all cheaper in general text"
    return f"{lowest}{among}, {told or 'and none is cheaper in general text'}"


def _price(best: Best) -> str:
    """What the next cheaper variant would cost and save, for whoever weighs the two otherwise."""
    if best.cheaper is None:
        return ""
    worse = _change(best.cheaper, best.group, best.domain, best.split)
    saved = -_change(best.cheaper, best.group, GENERAL, best.split)
    return f" ({best.cheaper.name} has {worse:.2g} % more on {best.domain} and {saved:.2g} % less in general)"


def _change(first: Group, second: Group, corpus: str, split: str) -> float:
    """By how many percent the first's perplexity is higher."""
    return 100 * (_value(first, corpus, split) / _value(second, corpus, split) - 1)


def _is_near(group: Group, lowest: Group, domain: str, split: str) -> bool:
    return _value(group, domain, split) <= (1 + SLACK) * _value(lowest, domain, split)


def _point(group: Group, domain: str, split: str) -> tuple[float, float]:
    """(general, domain) perplexity; where general text is not measured the domain alone decides."""
    return _general(group, split), _value(group, domain, split)


def _general(group: Group, split: str) -> float:
    general = group.perplexity(GENERAL, split)
    return general.value if general else 0.0


def _value(group: Group, corpus: str, split: str) -> float:
    number = group.perplexity(corpus, split)
    assert number is not None, "groups without the number are left out before"
    return number.value
