"""The page on mixtures that were found: all that were tried, the one taken, the estimate beside measurements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from crosscal.report import write_report
from crosscal.report.found_mixtures import found_mixtures
from crosscal.report.groups import SeedGroup, groups_of
from crosscal.report.rows import ResultRow
from tests.helpers.made_up_run import result, sweep, write_run

OWN = "sparsegpt0-biomedical-auto"


def choice(*, evaluated: bool = False, corpora: tuple[str, ...] = ("biomedical", "general")) -> dict[str, Any]:
    """Three mixtures of two corpora, of which half and half is taken."""
    tried = []
    for weight in (0.0, 0.5, 1.0):
        losses = {"biomedical": 0.04 - 0.02 * weight, "general": 0.02 + 0.02 * weight}
        tried.append(
            {
                "weights": {"biomedical": weight, "general": 1 - weight},
                "losses": losses,
                "objective": math.sqrt(losses["biomedical"] * losses["general"]),
                "perplexity": {"biomedical": 55.5, "general": 91.25} if evaluated and weight == 0.5 else {},
            }
        )
    return {
        "variant": OWN,
        "found_by": "auto",
        "exponents": dict.fromkeys(corpora, 0.5),
        "weights": {"biomedical": 0.5, "general": 0.5},
        "tried": tried,
        "reason": "the smallest of three",
    }


def rows() -> list[ResultRow]:
    setting = {"sparsity": 0.5}
    own = [
        result(
            OWN,
            method="sparsegpt",
            setting=setting,
            mixture={"biomedical": 0.5, "general": 0.5},
            corpus_or_task=corpus,
            value=value,
            seed=0,
            found_by="auto",
        )
        for corpus, value in (("general", 90.0), ("biomedical", 54.0))
    ]
    return [*sweep(settings=(("sparsegpt", setting),)), *own]


def test_everything_tried_is_listed_and_the_one_taken_is_marked() -> None:
    [found] = found_mixtures({"choices": [choice()]}, groups_of(rows(), []))
    assert found.sentence.startswith(f"{OWN} is 0.5 general + 0.5 biomedical: the smallest of three")
    assert [row[0] for row in found.rows] == ["0", "0.5 ★", "1"]
    assert found.headers == ["biomedical", "general", "loss, biomedical", "loss, general", "geometric mean"]
    assert all(len(row) == len(found.headers) for row in found.rows)


def test_perplexities_of_candidates_stand_in_the_table_where_there_are_any() -> None:
    [found] = found_mixtures({"choices": [choice(evaluated=True)]}, groups_of(rows(), []))
    assert found.headers[-2:] == ["perplexity, biomedical (validation)", "perplexity, general (validation)"]
    assert [row[-2:] for row in found.rows] == [["–", "–"], ["55.50", "91.25"], ["–", "–"]]


def test_the_estimate_goes_through_the_dense_model_and_the_one_taken() -> None:
    from crosscal.report.found_plots import _estimate

    groups: list[SeedGroup] = groups_of(rows(), [])
    own = next(group for group in groups if group.name == OWN)
    losses = (0.03, 0.03)
    estimate = _estimate(groups, own, losses, "general", "biomedical")
    assert estimate is not None
    assert estimate.of((0.0, 0.0)) == pytest.approx((80.0, 50.0))
    assert estimate.of(losses) == pytest.approx((90.0, 54.0))
    assert estimate.of((0.06, 0.015)) == pytest.approx((90.0**2 / 80.0, math.sqrt(54.0 * 50.0)))


@pytest.mark.parametrize("results", [rows(), [row for row in rows() if row.variant != OWN], sweep()[:1]])
def test_the_page_holds_it_whatever_was_measured(tmp_path: Path, results: list[ResultRow]) -> None:
    write_run(tmp_path, results, choices=[choice()])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Mixtures that were found" in page
    assert "the smallest of three" in page
    assert "held-out loss, general" in page
    assert ("estimated from losses" in page) == any(row.variant == OWN for row in results)


def test_draws_of_one_search_are_one_group_though_each_found_its_own_weights() -> None:
    found = [
        result(
            f"{OWN}-s{seed}",
            method="sparsegpt",
            setting={"sparsity": 0.5},
            mixture={"general": 1 - weight, "biomedical": weight},
            seed=seed,
            value=80.0 + seed,
            found_by="auto",
        )
        for seed, weight in ((0, 0.5), (1, 0.625))
    ]
    [group] = groups_of(found, [])
    assert group.variants == (f"{OWN}-s0", f"{OWN}-s1")
    assert group.perplexity("general").value == 80.5  # type: ignore[union-attr]
