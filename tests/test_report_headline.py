"""What to take: laws over made-up runs, against the rule written out plainly."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest

from crosscal.report import ResultRow, WindowRow
from crosscal.report.groups import Group, groups_of
from crosscal.report.headline import RULE, SLACK, best_variants, domains_of, sentence
from crosscal.report.pairing import is_told_apart, log_difference
from tests.helpers.made_up_run import result, sweep, windows_of

SELF = [("self", {"self": 1.0}), ("half", {"self": 0.5, "law": 0.5}), ("law", {"law": 1.0}), ("random", {"random": 1})]


def points(*perplexities: tuple[float, float]) -> list[ResultRow]:
    """Variants of one level with these (general, law) perplexities, alpha rising by a tenth."""
    return [
        result(
            f"v{i}", method="sparsegpt", setting={"sparsity": 0.5}, mixture=mixture, corpus_or_task=corpus, value=value
        )
        for i, pair in enumerate(perplexities)
        for mixture in [{"general": 1 - i / 10, "law": i / 10} if i else {"general": 1.0}]
        for corpus, value in zip(("general", "law"), pair, strict=True)
    ]


def self_calibrated(seed: int) -> list[ResultRow]:
    """A run without general calibration text: what the model wrote, a domain, random tokens; both measured."""
    chance = random.Random(seed)
    return [
        result(
            name, method="sparsegpt", setting={"sparsity": 0.7}, mixture=mixture, corpus_or_task=corpus,
            value=chance.uniform(20, 40),
        )
        for name, mixture in SELF
        for corpus in ("general", "law")
    ]  # fmt: skip


def pair(group: Group) -> tuple[float, float]:
    general, law = group.perplexity("general"), group.perplexity("law")
    assert general
    assert law
    return general.value, law.value


def cannot_be_told(windows: list[WindowRow], one: str, other: str) -> bool:
    """The stated rule, written out: at most two standard errors of the paired differences."""
    nll = {row.variant: row.nll for row in windows if row.corpus == "law"}
    differences = [a - b for a, b in zip(nll[one], nll[other], strict=True)]
    return abs(statistics.fmean(differences)) <= 2 * statistics.stdev(differences) / math.sqrt(len(differences))


@pytest.mark.parametrize("noise", [1e-5, 0.003, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(25))
def test_the_cheapest_of_those_that_cannot_be_told_from_the_best(seed: int, noise: float) -> None:
    chance = random.Random(seed)
    rows = points(*((chance.uniform(90, 110), chance.uniform(50, 52)) for _ in range(chance.randrange(1, 9))))
    windows = windows_of(rows, noise=noise)
    groups = groups_of(rows, [], windows)
    (best,) = best_variants(groups, "law")
    values = {group.name: pair(group) for group in groups}
    front = [
        name for name, (general, law) in values.items()
        if not any(g <= general and d <= law and (g, d) != (general, law) for g, d in values.values())
    ]  # fmt: skip
    lowest = min(front, key=lambda name: values[name][1])
    alike = [name for name in front if name == lowest or cannot_be_told(windows, name, lowest)]
    assert best.group.name == min(alike, key=lambda name: values[name][0])
    assert (best.lowest.name, best.alike, best.windows) == (lowest, len(alike), 16)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_taken_is_never_dominated_and_the_ruler_never_runs_to_its_edge(seed: int, kept: bool) -> None:
    for rows in (self_calibrated(seed), points((100, 60), (104, 55.0), (103, 55.1), (110, 54.9))):
        groups = groups_of(rows, [], windows_of(rows, noise=0.02) if kept else [])
        for best in best_variants(groups, "law"):
            general, law = pair(best.group)
            assert not any(g <= general and d <= law and (g, d) != (general, law) for g, d in map(pair, groups))
    assert best.group.name == "v2", "0.4 % of the domain is not worth 7 % of general text"


def test_a_gain_that_pairing_tells_apart_is_taken_however_small_beside_the_errors() -> None:
    rows = points((100, 60), (101, 50.1), (104, 50.0))
    (best,) = best_variants(groups_of(rows, [], windows_of(rows, noise=1e-5)), "law")
    assert best.group.name == "v2"
    (best,) = best_variants(groups_of(rows, [], windows_of(rows, noise=0.02)), "law")
    assert best.group.name == "v1"
    text = sentence(best, {"v1"})
    assert "For law at 50 % sparsity take v1 (models/v1): law perplexity 50.1 ± 2.0, general 101.0 ± 2.0; " in text
    assert "over the same 16 windows not told from v2" in text
    assert "2.9 % lower general perplexity" in text


def test_without_the_windows_it_says_that_it_could_not_pair() -> None:
    rows = points((100, 60), (101, 50 * (1 + SLACK)), (104, 50.0), (99, 50 * (1 + SLACK) + 0.1))
    (best,) = best_variants(groups_of(rows, []), "law")
    assert (best.group.name, best.windows) == ("v1", None)
    assert "differences could not be paired" in sentence(best, ())
    assert "its model was not kept" in sentence(best, ())
    assert "within 1%" in RULE


def test_windows_that_do_not_match_are_not_paired() -> None:
    rows = points((100, 60), (101, 50.1), (104, 50.0))
    windows = [replace(row, nll=row.nll[: 9 if row.variant == "v2" else 16]) for row in windows_of(rows)]
    (best,) = best_variants(groups_of(rows, [], windows), "law")
    assert best.windows is None


def test_seeds_are_paired_and_their_deviation_adds_to_the_error() -> None:
    rows = sweep(seeds=(0, 1, 2), settings=(("sparsegpt", {"sparsity": 0.5}),))
    one, _, other = [group for group in groups_of(rows, [], windows_of(rows)) if not group.is_dense]
    found = log_difference(one, other, "biomedical", "test")
    assert found is not None
    logs = {row.variant: math.log(row.value or 0) for row in rows if row.corpus_or_task == "biomedical"}
    values = [[logs[variant] for variant in group.variants] for group in (one, other)]
    by_seed = [a - b for a, b in zip(*values, strict=True)]
    assert found.mean == pytest.approx(statistics.fmean(by_seed))
    assert (found.stderr or 0) >= statistics.stdev(by_seed) / math.sqrt(3)
    assert log_difference(one, one, "biomedical", "test") == log_difference(other, other, "biomedical", "test")
    same = log_difference(one, one, "biomedical", "test")
    assert same
    assert not is_told_apart(same)


def test_text_without_a_test_is_no_domain_and_every_measured_variant_is_compared() -> None:
    groups = groups_of(self_calibrated(0), [])
    assert domains_of(groups) == ["law"]
    (best,) = best_variants(groups, "law")
    assert best.compared == 4


def test_without_general_text_the_lowest_of_the_domain_is_taken() -> None:
    rows = [row for row in points((100, 60), (104, 55), (110, 54.9)) if row.corpus_or_task == "law"]
    (best,) = best_variants(groups_of(rows, []), "law")
    assert (best.group.name, best.general) == ("v2", None)
    assert "general text not being measured" in sentence(best, ())


def test_one_argument_says_on_which_split_is_chosen() -> None:
    rows = points((100, 60), (104, 55))
    chosen_on = [
        result(row.variant, method=row.method, setting=row.setting, mixture=row.mixture, split="validation",
               corpus_or_task=row.corpus_or_task, value={"v0": 50.0, "v1": 90.0}[row.variant])
        for row in rows
    ]  # fmt: skip
    groups = groups_of([*rows, *chosen_on], [])
    assert [best.group.name for best in best_variants(groups, "law", "validation")] == ["v0"]
    assert [best.group.name for best in best_variants(groups, "law")] == ["v1"]
    assert "law perplexity 60.0" in sentence(best_variants(groups, "law", "validation")[0], ()), (
        "said is what the test says"
    )


def test_the_change_compares_with_general_text_alone() -> None:
    (best,) = best_variants(groups_of(points((100, 60), (101, 55)), []), "law")
    assert best.change == pytest.approx(55 / 60 - 1)
    (best,) = best_variants(groups_of(points((100, 60), (101, 61)), []), "law")
    assert (best.group.name, best.change) == ("v0", None)


def test_levels_are_chosen_for_separately_and_other_domains_bring_no_better() -> None:
    rows = [*sweep(), *sweep(domain="legal", corpora=("general", "biomedical"), alphas=(1.0,))]
    found = best_variants(groups_of(rows, []), "biomedical")
    assert [(best.level, best.group.domains <= {"biomedical"}) for best in found] == [
        ("50 % sparsity", True),
        ("4 bits", True),
    ]
    assert best_variants(groups_of(rows, []), "legal") == []
