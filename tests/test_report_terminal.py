"""The table in a terminal: at any usual width every name and every number is shown in full."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from crosscal.report import ResultRow
from crosscal.report.groups import columns_of, groups_of
from crosscal.report.numbers import short_text
from crosscal.report.terminal import TerminalTable
from tests.helpers.made_up_run import kept_dense, layer, result

TASKS = ("general_facts", "biomedical_facts", "legal_facts")


def shown(rows: list[ResultRow], width: int, layers: list | None = None, *, soft_wrap: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, soft_wrap=soft_wrap)
    console.print(TerminalTable(groups_of(rows, layers or []), columns_of(rows)), markup=False, highlight=False)
    return stream.getvalue()


def wide_run(seed: int) -> list[ResultRow]:
    """Rows with names of any length, and perplexities from 2 to those of a broken model."""
    chance = random.Random(seed)
    corpora = ("general", "biomedical", "legal", "a_longer_name-2024")[: chance.randrange(1, 5)]
    rows = []
    for number in range(6):
        name = f"v{number}-" + "x" * chance.randrange(1, 60)
        for corpus in corpora:
            value = 10 ** chance.choice((0.3, 2.0, 4.9, 13.0)) * chance.uniform(1, 1.2)
            rows.append(result(name, method="gptq", setting={"bits": 4}, corpus_or_task=corpus, value=value))
        for task in TASKS:
            value = chance.choice((1.0, 0.5, 0.033))
            rows.append(
                result(name, method="gptq", setting={"bits": 4}, corpus_or_task=task, metric="acc", value=value)
            )
    return rows


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("seed", range(8))
def test_no_number_is_cut_and_no_line_too_long(seed: int, width: int) -> None:
    rows = wide_run(seed)
    text = shown(rows, width, soft_wrap=True)
    assert all(cell_len(line) <= width for line in text.splitlines())
    lines = [line for line in text.splitlines() if line.strip()]
    for group in groups_of(rows, []):
        starts = [index for index, line in enumerate(lines) if line.startswith(group.name[:10])]
        found = " ".join(lines[index] for index in starts).split()
        for column in columns_of(rows):
            assert short_text(group.numbers[column], column[2]) in found
    body = re.sub(r".*acc %|.*ppl", "", text)
    assert "…" not in body.split("─")[-1]


@pytest.mark.parametrize("seed", range(8))
def test_a_folded_name_is_still_the_whole_name(seed: int) -> None:
    rows = wide_run(seed)
    text = shown(rows, 80)
    for group in groups_of(rows, []):
        assert group.name.replace("-", "") in re.sub(r"[^vx0-9]", "", re.sub(r" [\d.e+]+(?= |$)", "", text, flags=re.M))


def test_the_demos_table_fits_in_80_columns_in_one_piece() -> None:
    names = ["dense", "sparsegpt-2of4-biomedical-a0.5"]
    rows = [
        result(name, corpus_or_task=corpus, value=2.5)
        for name in names
        for corpus in ("general", "biomedical", "legal")
    ]
    rows += [result(name, corpus_or_task=task, metric="acc", value=1.0) for name in names for task in TASKS]
    text = shown(rows, 80, soft_wrap=True)
    assert text.count("variant") == 1
    assert max(map(cell_len, text.splitlines())) <= 80
    assert text.count("100.0") == 6


def test_columns_of_one_short_name_are_told_apart() -> None:
    rows = [result(corpus_or_task=name) for name in ("biomedical-2023", "biomedical-2024")]
    text = shown(rows, 80)
    assert "3" in text.split("─")[0]
    assert "4" in text.split("─")[0]


def test_names_are_shown_as_they_are() -> None:
    text = shown([result("[red]v[/red]", corpus_or_task="[b]law")], 200)
    assert "[red]v[/red]" in text
    assert "[b]law" in text


def test_matrices_left_dense_stand_in_every_part_of_a_split_table() -> None:
    rows = wide_run(3)
    names = list(dict.fromkeys(row.variant for row in rows))
    layers = [kept_dense(names[0], 0, "a"), *(layer(name, 0, "b") for name in names)]
    text = shown(rows, 60, layers)
    assert text.count("variant") > 1
    assert text.count("1 (50 %)") == text.count("variant")


def test_tasks_alone() -> None:
    text = shown([result(corpus_or_task="facts", metric=metric, value=0.25) for metric in ("acc", "acc_norm")], 80)
    assert text.count("25.0") == 1
    assert "25.0" in shown([result(corpus_or_task="odd", metric="acc_norm", value=0.25)], 80)
