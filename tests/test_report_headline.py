"""Recommendations: laws over made-up runs, and against a plain version of the rule."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
from scipy.stats import t

from crosscal.evaluation import VALIDATION
from crosscal.evaluation.comparison import Draws, is_distinguishable, log_difference
from crosscal.report import ResultRow, WindowRow
from crosscal.report.groups import SeedGroup, groups_of
from crosscal.report.headline import RULE, SLACK, Recommendation, best_variants, domains_of, sentence, sentences
from tests.helpers.made_up_run import on_both_splits, result, sweep, windows_of

SELF = [("self", {"self": 1.0}), ("half", {"self": 0.5, "law": 0.5}), ("law", {"law": 1.0}), ("random", {"random": 1})]


def points(*perplexities: tuple[float, float]) -> list[ResultRow]:
    """Variants of one level with these (general, law) perplexities, alpha rising by a tenth."""
    return on_both_splits(
        [
            result(
                f"v{i}",
                method="sparsegpt",
                setting={"sparsity": 0.5},
                mixture=mixture,
                corpus_or_task=corpus,
                value=value,
            )
            for i, pair in enumerate(perplexities)
            for mixture in [{"general": 1 - i / 10, "law": i / 10} if i else {"general": 1.0}]
            for corpus, value in zip(("general", "law"), pair, strict=True)
        ]
    )


def self_calibrated(seed: int) -> list[ResultRow]:
    """A run calibrated on the model's own text, a domain and random tokens; measured on general text and the domain."""
    chance = random.Random(seed)
    return on_both_splits([
        result(
            name, method="sparsegpt", setting={"sparsity": 0.7}, mixture=mixture, corpus_or_task=corpus,
            value=chance.uniform(20, 40),
        )
        for name, mixture in SELF
        for corpus in ("general", "law")
    ])  # fmt: skip


def pair(group: SeedGroup) -> tuple[float, float]:
    general, law = group.perplexity("general"), group.perplexity("law")
    assert general
    assert law
    return general.value, law.value


def cannot_be_told(windows: list[WindowRow], one: str, other: str, comparisons: int) -> bool:
    """The stated rule: Student's t over paired differences, at 5 % divided by the number of comparisons."""
    nll = {row.variant: row.nll for row in windows if (row.corpus, row.split) == ("law", "validation")}
    differences = [a - b for a, b in zip(nll[one], nll[other], strict=True)]
    most = float(t.ppf(1 - 0.025 / comparisons, len(differences) - 1))
    return abs(statistics.fmean(differences)) <= most * statistics.stdev(differences) / math.sqrt(len(differences))


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
    alike = [name for name in front if name == lowest or cannot_be_told(windows, name, lowest, len(front) - 1)]
    assert best.group.name == min(alike, key=lambda name: values[name][0])
    assert (best.lowest.name, best.alike, best.windows) == (lowest, len(alike), 16)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kept", [True, False])
def test_recommendation_is_pareto_optimal_and_trades_gains_sensibly(seed: int, kept: bool) -> None:
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
    assert (
        "For law at 50 % sparsity take v1 (models/v1): law perplexity 50.1 ± 2.0, general 101.0 ± 2.0 on test" in text
    )
    assert "chosen on validation text: over the same 16 windows not distinguishable from v2" in text
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

    def seeds_of(group: SeedGroup) -> Draws:
        return group.window_nll["biomedical", VALIDATION]

    found = log_difference(seeds_of(one), seeds_of(other))
    assert found is not None
    logs = {row.variant: math.log(row.value or 0) for row in rows if row.corpus_or_task == "biomedical"}
    values = [[logs[variant] for variant in group.variants] for group in (one, other)]
    by_seed = [a - b for a, b in zip(*values, strict=True)]
    assert found.mean == pytest.approx(statistics.fmean(by_seed))
    assert (found.stderr or 0) >= statistics.stdev(by_seed) / math.sqrt(3)
    same = log_difference(seeds_of(one), seeds_of(one))
    assert same == log_difference(seeds_of(other), seeds_of(other))
    assert same
    assert not is_distinguishable(same)


def test_a_search_that_found_general_text_is_not_the_general_only_baseline() -> None:
    """A searched mixture may be another with the next draw."""
    given = points((100, 60), (104, 50))
    searched = [replace(row, variant="v0-auto", found_by="auto") for row in given if row.variant == "v0"]
    (best,) = best_variants(groups_of([*searched, *given], []), "law")
    assert best.general_only
    assert (best.group.name, best.general_only.name) == ("v1", "v0")
    (best,) = best_variants(groups_of([*searched, *(row for row in given if row.variant != "v0")], []), "law")
    assert best.general_only is None


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


def poisoned(rows: list[ResultRow], windows: list[WindowRow], chance: random.Random) -> tuple[list, list]:
    """Return the same run with other test numbers: shuffled among the variants, or missing, and with other windows."""
    values = [row.value for row in rows if row.split == "test"]
    chance.shuffle(values)
    fresh = iter(values)
    rows = [
        replace(row, value=next(fresh), stderr=chance.uniform(0, 9)) if row.split == "test" else row for row in rows
    ]
    rows = [row for row in rows if row.split != "test" or chance.random() < 0.9]
    windows = [
        replace(row, nll=[chance.uniform(0, 9) for _ in range(chance.randrange(1, 20))]) if row.split == "test" else row
        for row in windows
    ]
    return rows, windows


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_no_test_number_enters_a_choice(seed: int, kept: bool) -> None:
    chance = random.Random(seed)
    made = (
        self_calibrated(seed),
        points(*((chance.uniform(90, 110), chance.uniform(50, 52)) for _ in range(8))),
        sweep(seeds=(0, 1)),
    )
    for rows in made:
        windows = windows_of(rows, noise=chance.choice([1e-5, 0.003, 0.05])) if kept else []
        other = groups_of(*_interleaved(poisoned(rows, windows, chance)))
        for domain in domains_of(groups_of(rows, [])):
            before, after = (best_variants(groups, domain) for groups in (groups_of(rows, [], windows), other))
            assert [choice(best) for best in before] == [choice(best) for best in after]
            assert before


def _interleaved(files: tuple[list, list]) -> tuple[list, list, list]:
    return files[0], [], files[1]


def choice(best: Recommendation) -> tuple:
    """Return all that was chosen, and why, without the reported numbers."""
    names = [group and group.name for group in (best.group, best.lowest, best.cheaper, best.general_only)]
    why = sentence(best, ()).partition("chosen on validation text")[2]
    return best.level, names, best.compared, best.alike, best.windows, best.chosen_by, why


def test_of_two_splits_that_disagree_one_chooses_and_the_other_is_said() -> None:
    test = [row for row in points((100, 60), (104, 55)) if row.split == "test"]
    chosen_on = [replace(row, split="validation", value={"v0": 50.0, "v1": 90.0}[row.variant]) for row in test]
    groups = groups_of([*test, *chosen_on], [])
    (best,) = best_variants(groups, "law")
    assert best.group.name == "v0"
    assert "law perplexity 60.0" in sentence(best, ()), "said is what the test says"


def test_without_validation_text_nothing_is_chosen_and_that_is_said() -> None:
    rows = [row for row in points((100, 60), (104, 55)) if row.split == "test"]
    groups = groups_of(rows, [], windows_of(rows))
    assert best_variants(groups, "law") == []
    (said,) = sentences(groups, (), "models")
    assert said.startswith("For law nothing is chosen: it has no validation windows")
    dense = [
        result(corpus_or_task=corpus, split=split) for corpus in ("general", "law") for split in ("test", "validation")
    ]
    (said,) = sentences(groups_of([*dense, *rows], []), (), "models")
    assert "no compressed variant was measured on it" in said


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
