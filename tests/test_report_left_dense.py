"""Matrices left dense: in no mean, counted beside every number, and no advantage in comparisons."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from crosscal.report import LayerRow, write_report
from crosscal.report.exhibits import results_table, trade_off_page
from crosscal.report.groups import columns_of, groups_of
from crosscal.report.headline import best_variants
from crosscal.report.left_dense import SLACK, left_dense_of
from crosscal.report.table import best_cells, summary_table
from crosscal.report.terminal import TerminalTable
from tests.helpers.made_up_run import kept_dense, layer, result, sweep, windows_of, write_run

MATRICES = ("self_attn.q_proj", "mlp.down_proj")
REASONS = ("keep-dense: not positive definite", "left dense: a router")


def some_layers(variant: str, seed: int) -> list[LayerRow]:
    chance = random.Random(f"{variant} {seed}")
    return [
        layer(
            variant,
            block,
            matrix,
            relative_loss=chance.uniform(0.01, 0.5),
            heldout_relative_loss=chance.choice([None, chance.uniform(0.01, 0.5)]),
            parameters=chance.randrange(1, 5000),
        )
        for block in range(3)
        for matrix in MATRICES
    ]


@pytest.mark.parametrize("seed", range(20))
def test_means_are_those_of_the_solved_matrices_whatever_else_stays_dense(seed: int) -> None:
    chance = random.Random(seed)
    solved = some_layers("v", seed)
    dense = [
        kept_dense("v", 9, f"m{i}", fallback=chance.choice(REASONS), parameters=chance.randrange(1, 5000))
        for i in range(chance.randrange(1, 9))
    ]
    mixed = [*solved, *dense]
    chance.shuffle(mixed)
    rows = [result("v", method="sparsegpt")]
    (alone,), (beside,) = groups_of(rows, solved), groups_of(rows, mixed)
    assert beside.relative_loss == alone.relative_loss
    assert beside.heldout_relative_loss == alone.heldout_relative_loss
    counted = beside.left_dense
    assert (counted.matrices, counted.of_matrices) == (len(dense), len(mixed))
    parameters = [sum(row.parameters or 0 for row in rows) for rows in (dense, mixed)]
    assert counted.share == pytest.approx(parameters[0] / parameters[1])


def test_a_variant_of_which_all_stays_dense_has_no_loss() -> None:
    rows = [result("v", method="sparsegpt")]
    (group,) = groups_of(rows, [kept_dense("v", 0, matrix) for matrix in MATRICES])
    assert group.relative_loss is None
    assert group.left_dense.text == "2 of 2 matrices, 100 % of their parameters"


def test_older_rows_are_counted_without_a_share_of_parameters() -> None:
    found = left_dense_of([kept_dense("v", 0, "a", parameters=None), layer("v", 0, "b")])
    assert (found.text, found.short, found.share) == ("1 of 2 matrices", "1", 0.5)


SWEEP = sweep()
NAMES = list(dict.fromkeys(row.variant for row in SWEEP if row.method != "dense"))
PARTLY = "sparsegpt0-biomedical-a1"


def layers_with(dense_in: dict[str, int]) -> list[LayerRow]:
    """Ten matrices for each variant, the first `dense_in` of them left dense."""
    return [
        (kept_dense if index < dense_in.get(name, 0) else layer)(name, index, "mlp.down_proj")
        for name in NAMES
        for index in range(10)
    ]


def test_their_number_and_share_stand_beside_every_number(tmp_path: Path) -> None:
    layers = layers_with({PARTLY: 3})
    groups, columns = groups_of(SWEEP, layers), columns_of(SWEEP)
    table = summary_table(groups, columns)
    place = table.headers.index("left dense (of parameters)")
    cells = {row[0].text: row[place].text for row in table.rows}
    assert cells == dict.fromkeys(cells, "–") | {PARTLY: "3 of 10 (30 %)"}
    stream = io.StringIO()
    Console(file=stream, width=80).print(TerminalTable(groups, columns))
    (line,) = [line for line in stream.getvalue().splitlines() if line.startswith(PARTLY)]
    assert "3 (30 %)" in line
    (row,) = [row for row in results_table(groups, columns).rows if row["variant"] == PARTLY]
    assert row["left dense"] == "3 (30 %)"
    page = write_report(write_run(tmp_path, SWEEP, layers)).read_text(encoding="utf-8")
    assert "3 of 10 matrices, 30 % of their parameters" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "3 (30 %) dense" in drawn, "a drawn point says so"


def test_what_all_variants_have_in_common_is_said_once(tmp_path: Path) -> None:
    layers = layers_with(dict.fromkeys(NAMES, 2))
    page = write_report(write_run(tmp_path, SWEEP, layers)).read_text(encoding="utf-8")
    assert "In every variant 2 of 10 matrices, 20 % of their parameters stay dense." in page
    assert not any("dense)" in drawn or ") dense" in drawn for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert best_variants(groups_of(SWEEP, layers), "biomedical"), "and does not keep them from being compared"


@pytest.mark.parametrize("dense", [0, 1, 5, 10])
def test_staying_dense_makes_no_variant_the_best(dense: int) -> None:
    """The variant with the best numbers, with more and more matrices left dense."""
    flattered = [
        result(PARTLY, method=row.method, setting=row.setting, mixture=row.mixture, seed=row.seed, split=row.split,
               corpus_or_task=row.corpus_or_task, value=40.0) if row.variant == PARTLY else row
        for row in SWEEP
    ]  # fmt: skip
    groups = groups_of(flattered, layers_with({PARTLY: dense}), windows_of(flattered))
    is_compared = dense / 10 <= SLACK
    taken = {best.group.name for best in best_variants(groups, "biomedical")}
    bold = {name for name, _ in best_cells(groups, columns_of(flattered))}
    assert (PARTLY in taken, PARTLY in bold) == (is_compared, is_compared)
    text = trade_off_page(groups) or ""
    assert (f"take {PARTLY}" in text) == is_compared


def test_where_everything_stays_dense_nothing_is_taken(tmp_path: Path) -> None:
    layers = layers_with(dict.fromkeys(NAMES, 10))
    groups = groups_of(SWEEP, layers)
    assert best_variants(groups, "biomedical") == []
    assert best_cells(groups, columns_of(SWEEP)) == set()
    page = write_report(write_run(tmp_path, SWEEP, layers)).read_text(encoding="utf-8")
    assert "take " not in re.sub(r"<[^>]*>", "", page).replace("What to take", "")
    assert "100 % of their parameters" in page
