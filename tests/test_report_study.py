"""A study's comparisons and conclusions; no test number chooses anything."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from crosscal.report import write_report
from crosscal.report.counterparts import counterpart
from crosscal.report.rows import DocumentRow, QuestionRow, ResultRow, StudyRow, write_rows
from crosscal.report.run_files import RunFiles, read_run
from crosscal.report.study import ALIKE, BETTER, WORSE, study_rows
from crosscal.report.study_table import DifferenceTable, sentences
from tests.helpers.made_up_run import kept_dense, layer, result, sweep, windows_of, write_run

ALPHAS = (0.0, 0.25, 0.5, 1.0)


def of_test_text(**changes: Any) -> list[ResultRow]:
    """Return a sweep without its validation windows."""
    return [row for row in sweep(**changes) if row.split == "test"]


def validation_of(rows: Sequence[ResultRow], **values: float) -> list[ResultRow]:
    """Return validation rows for test rows: with `values` by the ending of the variant's name, else as on test text."""
    changed = []
    for row in rows:
        ending = next((end for end in values if row.variant.removesuffix(f"-s{row.seed}").endswith(f"-{end}")), None)
        value = row.value if ending is None else values[ending]
        changed.append(dataclasses.replace(row, split="validation", value=value))
    return changed


def study_of(results: Sequence[ResultRow], folder: Path, noise: float = 0.001, **more: object) -> RunFiles:
    folder.mkdir(exist_ok=True)
    return read_run(write_run(folder, results, windows=windows_of(results, noise=noise), **more))  # type: ignore[arg-type]


def differences(rows: Sequence[StudyRow], rule: str) -> dict[tuple[str, str], StudyRow]:
    return {(row.variant, row.corpus_or_task): row for row in rows if row.rule == rule}


def test_a_difference_is_that_of_log_perplexity_draw_by_draw(tmp_path: Path) -> None:
    results = of_test_text(alphas=ALPHAS, seeds=(0, 1, 2), settings=[("sparsegpt", {"sparsity": 0.5})])
    found = differences(study_rows(study_of(results, tmp_path), ["general"]), "general")
    values = {(row.variant, row.corpus_or_task): row.value or 0.0 for row in results}
    assert {variant for variant, _ in found} == {f"sparsegpt0-biomedical-a{alpha:g}" for alpha in ALPHAS[1:]}
    for (variant, corpus), row in found.items():
        logs = [
            math.log(values[f"{variant}-s{seed}", corpus] / values[f"sparsegpt0-biomedical-a0-s{seed}", corpus])
            for seed in (0, 1, 2)
        ]
        assert row.value == pytest.approx(sum(logs) / 3)
        assert (row.draws, row.items, row.over) == (3, 16, "draws")
        assert row.interval is not None
        assert row.interval[0] < row.value < row.interval[1]
        assert row.verdict == (BETTER if corpus == "biomedical" else WORSE)


def test_draws_are_paired_by_their_seed_and_not_by_the_order_of_rows(tmp_path: Path) -> None:
    results = of_test_text(seeds=(0, 1, 2))
    first = study_rows(study_of(results, tmp_path / "in order"), ["general", "domain", "dense"])
    head, rest = results[:2], results[2:]
    random.Random(1).shuffle(rest)
    second = study_rows(study_of([*head, *rest], tmp_path / "shuffled"), ["general", "domain", "dense"])
    assert sorted(map(str, first)) == sorted(map(str, second))


def test_a_draw_that_only_one_has_is_left_out(tmp_path: Path) -> None:
    results = [row for row in of_test_text(seeds=(0, 1, 2)) if not (row.variant.endswith("-a0-s1"))]
    found = differences(study_rows(study_of(results, tmp_path), ["general"]), "general")
    assert {row.draws for row in found.values()} == {2}


def test_a_model_without_calibration_text_stands_beside_every_draw(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"method": "magnitude", "setting": {"sparsity": 0.5}, "value": 200.0, "seed": 0}
    results = of_test_text(seeds=(0, 1, 2), settings=[("wanda", {"sparsity": 0.5})])
    results += [result("magnitude-50", corpus_or_task=name, **plain) for name in ("general", "biomedical")]
    rows = study_rows(study_of(results, tmp_path), ["magnitude", "dense"])
    found = differences(rows, "magnitude")
    assert {row.draws for row in found.values()} == {3}
    assert {row.verdict for row in found.values()} == {BETTER}
    against_dense = differences(rows, "dense")["magnitude-50", "general"]
    assert (against_dense.draws, against_dense.over) == (1, "windows")


def test_noise_is_not_distinguishable_and_more_comparisons_are_less_sure(tmp_path: Path) -> None:
    noisy = [
        dataclasses.replace(row, value=(row.value or 0) * (1 + random.Random(row.variant).gauss(0, 0.2)))
        for row in of_test_text(seeds=(0, 1, 2))
    ]
    rows = [row for row in study_rows(study_of(noisy, tmp_path), ["general"]) if row.rule]
    assert {row.verdict for row in rows} == {ALIKE}
    for row in rows:
        assert row.comparisons == 4
        assert row.p is not None
        assert row.p_holm is not None
        assert row.p <= row.p_holm


def test_a_search_that_finds_a_listed_mixture_adds_no_comparison(tmp_path: Path) -> None:
    results = of_test_text(seeds=(0, 1, 2), settings=[("sparsegpt", {"sparsity": 0.5})])
    searched = [
        dataclasses.replace(row, variant=row.variant.replace("-a0.5-", "-auto-"), found_by="the best")
        for row in results
        if "-a0.5-" in row.variant
    ]
    without = differences(study_rows(study_of(results, tmp_path / "without"), ["general"]), "general")
    found = differences(study_rows(study_of([*results, *searched], tmp_path / "found"), ["general"]), "general")
    assert {row.comparisons for row in found.values()} == {2}
    for key, row in without.items():
        assert found[key].p_holm == pytest.approx(row.p_holm)
    elsewhere = [
        dataclasses.replace(row, mixture={"general": 0.375, "biomedical": 0.625}) if row.seed == 2 else row
        for row in searched
    ]
    other = study_rows(study_of([*results, *elsewhere], tmp_path / "elsewhere"), ["general"])
    assert {row.comparisons for row in differences(other, "general").values()} == {3}


def test_windows_that_disagree_leave_a_difference_in_doubt(tmp_path: Path) -> None:
    """However similar the draws are, other test text might reverse the difference."""
    results = of_test_text(seeds=(0, 1, 2), settings=[("sparsegpt", {"sparsity": 0.5})])
    files = study_of(results, tmp_path)
    shared = [0.9 if number % 2 else -0.9 for number in range(16)]
    windows = [
        dataclasses.replace(row, nll=[nll + far for nll, far in zip(row.nll, shared, strict=True)])
        if "-a1" in row.variant
        else row
        for row in files.windows
    ]
    rows = differences(study_rows(dataclasses.replace(files, windows=windows), ["general"]), "general")
    assert rows["sparsegpt0-biomedical-a1", "biomedical"].p_holm < 0.05  # type: ignore[operator]
    assert rows["sparsegpt0-biomedical-a1", "biomedical"].verdict == ALIKE
    assert rows["sparsegpt0-biomedical-a0.5", "biomedical"].verdict == BETTER


@pytest.mark.parametrize("poison", [0.001, 1.0, 1e4])
def test_what_is_chosen_depends_on_validation_text_alone(tmp_path: Path, poison: float) -> None:
    test = of_test_text(alphas=ALPHAS, seeds=(0, 1), settings=[("sparsegpt", {"sparsity": 0.5})])
    chances = random.Random(poison)
    poisoned = [dataclasses.replace(row, value=(row.value or 0) * poison * chances.random() + 1) for row in test]
    for best in ("a0", "a0.25", "a1"):
        rows = [*poisoned, *validation_of(test, **{best: 30.0})]
        found = study_rows(study_of(rows, tmp_path / best), ["general"])
        assert {row.variant for row in found if row.chosen} == {f"sparsegpt0-biomedical-{best}"}


def test_without_validation_text_nothing_is_chosen(tmp_path: Path) -> None:
    rows = study_rows(study_of(of_test_text(alphas=ALPHAS, seeds=(0, 1)), tmp_path), ["general"])
    assert not any(row.chosen for row in rows)
    assert sentences(rows) == []


def test_a_mixture_that_was_found_is_compared_but_neither_baseline_nor_chosen_again(tmp_path: Path) -> None:
    """Even if it is general text alone, others are not compared with it."""
    rows = sweep(settings=[("sparsegpt", {"sparsity": 0.5})], seeds=(0, 1))
    general = [row for row in rows if "-a0-" in row.variant]
    found = [
        dataclasses.replace(row, variant=row.variant.replace("-a0-", "-auto-"), value=1.0, found_by="auto")
        for row in general
    ]
    rows = [*rows[:4], *found, *rows[4:]]
    compared = study_rows(study_of(rows, tmp_path), ["general"])
    baselines = {row.baseline for row in compared if row.rule}
    assert baselines == {"sparsegpt0-biomedical-a0"}
    assert "sparsegpt0-biomedical-auto" in {row.variant for row in compared if row.rule}
    assert "sparsegpt0-biomedical-auto" not in {row.variant for row in compared if row.chosen}


def test_a_domain_may_be_called_auto(tmp_path: Path) -> None:
    """Its variants are named like those of a search, and are not."""
    corpora, settings = ("general", "auto"), [("sparsegpt", {"sparsity": 0.5})]
    rows = study_rows(study_of(sweep(corpora=corpora, domain="auto", settings=settings), tmp_path), ["domain"])
    assert {row.baseline for row in rows if row.rule} == {"sparsegpt0-auto-a1"}
    assert len({row.variant for row in rows if row.chosen}) == 1


def test_baselines_are_the_same_but_for_one_thing(tmp_path: Path) -> None:
    settings = [(method, {"sparsity": sparsity}) for sparsity in (0.5, 0.6) for method in ("sparsegpt", "wanda")]
    groups = study_of(of_test_text(settings=settings), tmp_path).groups
    names = {group.name: group for group in groups}

    def baseline(name: str, rule: str) -> str | None:
        found = counterpart(names[name], rule, groups)
        return found and found.name

    mixed = "sparsegpt2-biomedical-a0.5"
    assert baseline(mixed, "general") == "sparsegpt2-biomedical-a0"
    assert baseline(mixed, "domain") == baseline(mixed, "biomedical") == "sparsegpt2-biomedical-a1"
    assert baseline(mixed, "wanda") == "wanda3-biomedical-a0.5"
    assert baseline(mixed, "wanda3-biomedical-a1") == "wanda3-biomedical-a1"
    assert baseline(mixed, "dense") == "dense"
    assert baseline("sparsegpt2-biomedical-a0", "general") is None, "nothing is its own baseline"
    assert baseline("dense", "general") is None


def test_methods_are_compared_on_equally_normalised_mixtures(tmp_path: Path) -> None:
    rows = of_test_text(settings=[(method, {"sparsity": 0.5}) for method in ("sparsegpt", "wanda")])
    normalised = [
        dataclasses.replace(row, variant=row.variant.replace("-a0.5", "-a0.5-tracenorm"), trace_normalised=True)
        for row in rows
        if "-a0.5" in row.variant
    ]
    groups = study_of([*normalised, *rows], tmp_path).groups
    by_name = {group.name: group for group in groups}
    for ending in ("-a0.5", "-a0.5-tracenorm"):
        found = counterpart(by_name[f"sparsegpt0-biomedical{ending}"], "wanda", groups)
        assert found is by_name[f"wanda1-biomedical{ending}"]
    alone = counterpart(by_name["sparsegpt0-biomedical-a0.5-tracenorm"], "general", groups)
    assert alone is by_name["sparsegpt0-biomedical-a0"], "one corpus alone has no traces to normalise"


def test_accuracies_are_compared_question_by_question(tmp_path: Path) -> None:
    """Twelve of a hundred won and none lost is distinguishable; by the standard errors of both it would not be."""
    results, asked = of_test_text(settings=[("sparsegpt", {"sparsity": 0.5})], seeds=(0,)), []
    for variant, right in (("sparsegpt0-biomedical-a0", 50), ("sparsegpt0-biomedical-a1", 62)):
        like = next(row for row in results if row.variant == variant)
        stderr = math.sqrt(right / 100 * (1 - right / 100) / 99)
        changes: dict[str, Any] = {"corpus_or_task": "facts", "metric": "acc", "value": right / 100, "stderr": stderr}
        results.append(dataclasses.replace(like, **changes))
        asked.append(QuestionRow(variant, "facts", "test", "acc", [number < right for number in range(100)]))
    files = study_of(results, tmp_path)
    paired = differences(study_rows(dataclasses.replace(files, questions=asked), ["general"]), "general")
    unpaired = differences(study_rows(files, ["general"]), "general")
    name = ("sparsegpt0-biomedical-a1", "facts")
    assert paired[name].value == unpaired[name].value == pytest.approx(0.12)
    assert (paired[name].over, paired[name].items, unpaired[name].items) == ("questions", 100, None)
    assert (paired[name].verdict, unpaired[name].verdict) == (BETTER, ALIKE)


def test_summaries_are_compared_document_by_document(tmp_path: Path) -> None:
    """Documents differ from one another far more than the summaries of two models."""
    results, scored = of_test_text(settings=[("sparsegpt", {"sparsity": 0.5})], seeds=(0,)), []
    for variant, more in (("sparsegpt0-biomedical-a0", 0.0), ("sparsegpt0-biomedical-a1", 0.02)):
        like = next(row for row in results if row.variant == variant)
        scores = [number / 50 + more * (1 + number % 2) for number in range(40)]
        found: dict[str, Any] = {"value": fmean(scores), "stderr": stdev(scores) / math.sqrt(40)}
        results.append(dataclasses.replace(like, corpus_or_task="papers", metric="rougeL", **found))
        scored.append(DocumentRow(variant, "papers", "test", "rougeL", scores))
    write_rows(tmp_path / "summaries.jsonl", scored)
    row = differences(study_rows(study_of(results, tmp_path), ["general"]), "general")[
        "sparsegpt0-biomedical-a1", "papers"
    ]
    assert row.value == pytest.approx(0.03)
    assert row.stderr == pytest.approx(stdev([0.02, 0.04] * 20) / math.sqrt(40))
    assert (row.over, row.items, row.verdict) == ("documents", 40, BETTER)


def test_what_leaves_more_of_the_model_dense_is_no_baseline(tmp_path: Path) -> None:
    results = of_test_text(settings=[("sparsegpt", {"sparsity": 0.5})])
    layers = [layer(name, 0, "q") for name in ("sparsegpt0-biomedical-a0.5", "sparsegpt0-biomedical-a1")]
    layers += [kept_dense("sparsegpt0-biomedical-a0", 0, "q")]
    files = study_of(results, tmp_path, layers=layers)
    rows = study_rows(files, ["general", "domain"])
    assert not differences(rows, "general")
    assert differences(rows, "domain")


def test_report_and_terminal_show_what_the_rows_say(tmp_path: Path) -> None:
    from rich.console import Console

    test = of_test_text(alphas=ALPHAS, seeds=(0, 1, 2), settings=[("sparsegpt", {"sparsity": 0.5})])
    results = [*test, *validation_of(test, **{"a0.5": 30.0})]
    folder = tmp_path
    rows = study_rows(study_of(results, folder), ["general", "domain"])
    write_rows(folder / "study.jsonl", rows)
    assert read_run(folder).study == rows
    page = write_report(folder).read_text()
    assert "How sure the differences are" in page
    assert page.count("<svg") >= 2
    for said in sentences(rows):
        assert said.startswith("sparsegpt0-biomedical-a0.5, chosen on validation text, against ")
        assert said in page
    console = Console(width=100)
    with console.capture() as captured:
        console.print(DifferenceTable(rows))
    row = differences(rows, "general")["sparsegpt0-biomedical-a0.5", "biomedical"]
    assert f"{100 * math.expm1(row.value):+.1f}" in captured.get()
    assert str(folder) not in page
