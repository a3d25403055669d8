"""Which variant to take for each domain, under a rule that the report states: chosen on validation windows, reported
with the numbers of test windows, which choose nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from crosscal.evaluation import VALIDATION
from crosscal.evaluation.choice import choose
from crosscal.evaluation.comparison import LEVEL, log_difference
from crosscal.evaluation.summaries import Difference
from crosscal.report.groups import GENERAL, Group
from crosscal.report.left_dense import SLACK as DENSE_SLACK
from crosscal.report.left_dense import compared
from crosscal.report.numbers import Number, number_text

SLACK = 0.01
"""How far above the lowest perplexity counts as alike where differences cannot be paired."""
RULE = (
    "Chosen on validation windows alone; test numbers are only reported. At each level of compression, of the variants "
    "that no other beats in both: the lowest general perplexity among those that cannot be told from the lowest domain "
    "perplexity, their mean difference of log perplexity over the same windows being within the margin of Student's t "
    f"at {LEVEL:.0%}, shared among the comparisons (or, where the windows' numbers were not kept, their perplexity "
    f"within {SLACK:.0%}). Variants with over {DENSE_SLACK:.0%} more of their parameters left dense than others of "
    "their level are not compared."
)


@dataclass(frozen=True)
class Best:
    """The variant to take for a domain at a level, and what it was chosen among."""

    domain: str
    level: str
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
        """On test windows, to be reported."""
        return self.group.perplexity(GENERAL)

    @property
    def special(self) -> Number | None:
        """On test windows, to be reported."""
        return self.group.perplexity(self.domain)

    @property
    def chosen_by(self) -> tuple[Number | None, Number | None]:
        """(domain, general) perplexity on validation windows."""
        return self.group.perplexity(self.domain, VALIDATION), self.group.perplexity(GENERAL, VALIDATION)

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


def best_variants(groups: Sequence[Group], domain: str) -> list[Best]:
    """One choice for each level by the perplexities on validation windows, whatever a variant was calibrated on.

    Where no variant has a general perplexity there is nothing to weigh, and the lowest domain perplexity is taken.
    Empty where no compressed variant was measured on validation windows of the domain.
    """
    measured = [group for group in groups if not group.is_dense and group.perplexity(domain, VALIDATION)]
    weighed = [group for group in measured if group.perplexity(GENERAL, VALIDATION)] or measured
    return [_best(found, domain, level) for level, found in compared(weighed).items()]


def _best(groups: Sequence[Group], domain: str, level: str) -> Best:
    def difference(one: int, other: int) -> Difference | None:
        nll = (list(groups[i].window_nll.get((domain, VALIDATION), {}).values()) for i in (one, other))
        return log_difference(*nll)

    found = choose([(_general(group), _value(group, domain)) for group in groups], difference, SLACK)
    chosen = groups[found.chosen]
    cheaper = [groups[index] for index in found.front if _general(groups[index]) < _general(chosen)]
    peers = [group for group in groups if group.mixture == {GENERAL: 1.0} and group.flavour == chosen.flavour]
    return Best(
        domain,
        level,
        chosen,
        groups[found.lowest],
        len(groups),
        len(found.alike),
        found.windows,
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
    said = f"{', '.join(numbers)} on test text; chosen on validation text: {_reason(best)}{_price(best)}{dense}"
    return f"For {best.domain}{at} take {group.name}{where}: {said}."


def sentences_of(groups: Sequence[Group], domain: str, kept: Collection[str], folder: str = "models") -> list[str]:
    """`sentence` for every level of a domain, or one that says why nothing is chosen."""
    found = [sentence(best, kept, folder) for best in best_variants(groups, domain)]
    if found:
        return found
    measured = [group for group in groups if group.perplexity(domain, VALIDATION)]
    why = "it has no validation windows, and test numbers choose nothing; give it validation documents"
    if measured:
        every_is_dense = "in each variant every matrix stays dense"
        why = "no compressed variant was measured on it" if all(g.is_dense for g in measured) else every_is_dense
    return [f"For {domain} nothing is chosen: {why}."]


def sentences(groups: Sequence[Group], kept: Collection[str], folder: str) -> list[str]:
    """`sentences_of` every domain."""
    return [said for domain in domains_of(groups) for said in sentences_of(groups, domain, kept, folder)]


def _reason(best: Best) -> str:
    lowest = f"the lowest perplexity on {best.domain}"
    if best.compared == 1:
        return "the only variant to compare at this level"
    among = f" of {best.compared} variants"
    if best.chosen_by[1] is None:
        return f"{lowest}{among}, general text not being measured"
    if best.windows is None:
        unpaired = "differences could not be paired, for the windows' numbers were not kept"
        return f"the lowest general perplexity of those within {SLACK:.0%} of {lowest}{among} ({unpaired})"
    if best.group is not best.lowest:
        less = _change(best.group, best.lowest, GENERAL)
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
    worse = _change(best.cheaper, best.group, best.domain)
    saved = -_change(best.cheaper, best.group, GENERAL)
    return f" ({best.cheaper.name} has {worse:.2g} % more on {best.domain} and {saved:.2g} % less in general)"


def _change(first: Group, second: Group, corpus: str) -> float:
    """By how many percent the first's perplexity is higher."""
    return 100 * (_value(first, corpus) / _value(second, corpus) - 1)


def _general(group: Group) -> float:
    """Where general text is not measured the domain alone decides."""
    return _value(group, GENERAL) if group.perplexity(GENERAL, VALIDATION) else 0.0


def _value(group: Group, corpus: str) -> float:
    number = group.perplexity(corpus, VALIDATION)
    assert number is not None, "groups without the number are left out before"
    return number.value
