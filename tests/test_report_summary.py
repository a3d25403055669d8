"""Groups and table: seeds together, the best of each level."""

from __future__ import annotations

import io

import numpy as np
import pytest

from crosscal.report.groups import choosing_columns, columns_of, groups_of
from crosscal.report.numbers import Number, number_text
from crosscal.report.table import LOWER_IS_BETTER, mixture_text, summary_table
from crosscal.report.terminal import TerminalTable
from tests.helpers.made_up_run import layer, result, sweep


def test_seeds_are_one_group_with_mean_and_deviation() -> None:
    rows = sweep(seeds=(0, 1, 5), alphas=(0.5,), settings=(("sparsegpt", {"sparsity": 0.5}),))
    dense, group = groups_of(rows, [])
    mine = [row for row in rows if (row.method, row.corpus_or_task, row.split) == ("sparsegpt", "general", "test")]
    values = [row.value for row in mine]
    found = group.perplexity("general")
    assert found is not None
    assert (found.value, found.error, found.seeds) == pytest.approx((np.mean(values), np.std(values, ddof=1), 3))
    assert group.name == "sparsegpt0-biomedical-a0.5"
    assert group.variants == tuple(f"sparsegpt0-biomedical-a0.5-s{seed}" for seed in (0, 1, 5))
    dense_number = dense.perplexity("general")
    assert dense_number is not None
    assert (dense_number.error, dense_number.seeds) == (2.0, 1)


def test_a_task_measured_by_its_name_and_by_its_tag_is_one_number() -> None:
    task = {"corpus_or_task": "arc_easy", "metric": "acc", "stderr": 0.02}
    (group,) = groups_of([result(**task, value=0.5), result(**task, value=0.5)], [])
    assert group.numbers["arc_easy", "test", "acc"] == Number(0.5, 0.02, 1)


def test_variants_that_differ_in_name_alone_stay_apart() -> None:
    rows = [result(name, method="gptq", setting={"bits": 4}, seed=0) for name in ("gptq-w4", "gptq-w4-tracenorm")]
    assert [group.name for group in groups_of(rows, [])] == ["gptq-w4", "gptq-w4-tracenorm"]


def test_a_flavour_says_what_tells_groups_apart() -> None:
    settings = [{"bits": 4, "damping": 0.01}, {"bits": 4, "damping": 0.1}, {"bits": 3, "damping": 0.01}]
    rows = [result(f"g{i}", method="gptq", setting=setting) for i, setting in enumerate(settings)]
    rows.append(result("w", method="wanda", setting={"sparsity": 0.5, "damping": 0.3}))
    assert [g.flavour for g in groups_of(rows, [])] == [
        "gptq, damping 0.01",
        "gptq, damping 0.1",
        "gptq, damping 0.01",
        "wanda",
    ]
    rows = [
        result(f"s{i}", method="sparsegpt", upstream=upstream) for i, upstream in enumerate(("dense", "sequential"))
    ]
    assert [group.flavour for group in groups_of(rows, [])] == ["sparsegpt, dense", "sparsegpt, sequential"]
    rows = [result(f"n{on}", method="sparsegpt", trace_normalised=on) for on in (False, True)]
    assert [group.flavour for group in groups_of(rows, [])] == ["sparsegpt", "sparsegpt, trace-normalised"]


@pytest.mark.parametrize(
    ("setting", "level", "sparsity"),
    [
        ({"sparsity": 0.55, "damping": 0.01}, "55 % sparsity", 0.55),
        ({"sparsity": "2:4"}, "2:4 sparsity", 0.5),
        ({"sparsity": "1:4"}, "1:4 sparsity", 0.75),
        ({"bits": 4, "group_size": 128}, "4 bits g128", None),
        ({"bits": 3, "group_size": None}, "3 bits", None),
        ({"rank": 8}, "rank 8", None),
        ({}, "", None),
    ],
)
def test_levels(setting: dict, level: str, sparsity: float | None) -> None:
    [group] = groups_of([result("one", method="some", setting=setting)], [])
    assert group.level == level
    amount = group.amount("sparsity")
    assert (amount and amount["value"]) == sparsity


def test_the_best_of_each_level_is_marked() -> None:
    rows = sweep(alphas=(0.0, 1.0))
    table = summary_table(groups_of(rows, []), [*columns_of(rows), *choosing_columns(rows)])
    corpora = ("general", "biomedical", "general (validation)", "biomedical (validation)")
    assert table.headers == ("variant", "method", "level", "mixture", *(f"{corpus} perplexity" for corpus in corpora))
    best = {
        (row[0].text, header)
        for row in table.rows
        for header, cell in zip(table.headers, row, strict=True)
        if cell.best
    }
    assert best == {
        (f"{method}-biomedical-a{alpha}", f"{corpus}{split} perplexity")
        for method in ("sparsegpt0", "gptq1")
        for alpha, corpus in ((0, "general"), (1, "biomedical"))
        for split in ("", " (validation)")
    }


def test_accuracies_are_percent_and_the_highest_is_best() -> None:
    shared = {"method": "gptq", "setting": {"bits": 4}, "corpus_or_task": "facts", "metric": "acc"}
    rows = [result("low", value=0.25, stderr=0.043, **shared), result("high", value=0.5, stderr=None, **shared)]
    table = summary_table(groups_of(rows, []), columns_of(rows))
    assert [(row[-1].text, row[-1].best) for row in table.rows] == [("25.0 ± 4.3 %", False), ("50.0 %", True)]


def test_the_lowest_is_best_where_lm_eval_says_so() -> None:
    from lm_eval.api import metrics, registry

    assert metrics, "importing it registers lm-eval's metrics"
    for metric, is_higher in registry.HIGHER_IS_BETTER_REGISTRY.items():
        assert (metric in LOWER_IS_BETTER) == (is_higher is False), metric


def test_losses_are_means_over_matrices() -> None:
    layers = [layer("v", 0, "a", relative_loss=0.1), layer("v", 1, "a", relative_loss=0.3, heldout_relative_loss=None)]
    rows = [result("v", method="sparsegpt")]
    (group,) = groups_of(rows, layers)
    assert group.relative_loss is not None
    assert group.heldout_relative_loss is not None
    assert (group.relative_loss.mean, group.heldout_relative_loss.mean) == pytest.approx((0.2, 0.04))
    (row,) = summary_table([group], columns_of(rows)).rows
    assert [cell.text for cell in row[-2:]] == ["20 %", "4 % (1 of 2)"]


def test_the_terminal_shows_names_as_they_are() -> None:
    from rich.console import Console

    rows = [result("[red]v[/red]", corpus_or_task="[b]law")]
    stream = io.StringIO()
    Console(file=stream, width=200).print(TerminalTable(groups_of(rows, []), columns_of(rows)))
    assert "[red]v[/red]" in stream.getvalue()
    assert "[b]law" in stream.getvalue()


def test_texts() -> None:
    assert mixture_text({"biomedical": 0.25, "general": 0.75}) == "0.75 general + 0.25 biomedical"
    assert mixture_text({"general": 0.0, "biomedical": 1.0}) == "biomedical"
    assert mixture_text({}) == "–"
    assert number_text(None, "perplexity") == "–"
