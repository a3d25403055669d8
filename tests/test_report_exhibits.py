"""Tables and pages of a run for other places: right numbers, bounded sizes, and a note on what was left out."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from crosscal.evaluation.summaries import PairedDifference
from crosscal.report import ResultRow
from crosscal.report.exhibits import (
    MOST_COLUMNS,
    MOST_NOTES,
    MOST_PICTURE_BYTES,
    MOST_PICTURES,
    MOST_ROWS,
    MOST_TABLE_BYTES,
    Table,
    decision_page,
    files_page,
    picture,
    results_table,
    trade_off_page,
)
from crosscal.report.groups import choosing_columns, columns_of, groups_of
from tests.helpers.made_up_run import result, sweep

RECORD = {"calibration_tokens_read": 768, "cache": {"hits": 3, "misses": 4}}


def table(rows: list[ResultRow]) -> Table:
    return results_table(groups_of(rows, []), columns_of(rows))


def page(rows: list[ResultRow]) -> str:
    return trade_off_page(groups_of(rows, [])) or ""


def test_cells_hold_the_perplexity_and_its_change_against_dense() -> None:
    rows = table(sweep()).rows
    dense = {"variant": "dense", "take": "", "alpha": ""}
    assert rows[0] == dense | {"general, test": "80.0 ± 2.0", "biomedical, test": "50.0 ± 2.0"}
    (half,) = [row for row in rows if row["variant"] == "sparsegpt0-biomedical-a0.5"]
    assert half == {
        "variant": "sparsegpt0-biomedical-a0.5",
        "take": "",
        "alpha": "0.5",
        "general, test": "90.0 ± 2.0 (+12.5 %)",
        "biomedical, test": "56.2 ± 2.0 (+12.5 %)",
    }


def test_dense_comes_first_then_each_level_by_alpha_and_what_to_take_is_marked() -> None:
    shuffled = sorted(sweep(), key=lambda row: (row.method != "sparsegpt", row.variant), reverse=True)
    rows = table([row for row in shuffled if row.variant == "dense"] + shuffled).rows
    names = [row["variant"] for row in rows]
    assert names == [
        "dense",
        *("gptq1-biomedical-a0", "gptq1-biomedical-a0.5", "gptq1-biomedical-a1"),
        *("sparsegpt0-biomedical-a0", "sparsegpt0-biomedical-a0.5", "sparsegpt0-biomedical-a1"),
    ]
    marked = {row["variant"]: row["take"] for row in rows if row["take"]}
    assert marked == dict.fromkeys(("gptq1-biomedical-a1", "sparsegpt0-biomedical-a1"), "for biomedical")


def test_accuracies_are_percentages_without_a_change() -> None:
    rows = [*sweep(), result(corpus_or_task="facts", metric="acc", value=0.5, stderr=None)]
    assert table(rows).rows[0]["facts acc, test"] == "50.0 %"


def test_a_table_of_any_sweep_is_small_and_says_what_it_leaves_out() -> None:
    settings = [("sparsegpt", {"sparsity": number / 1000}) for number in range(1, 300)]
    many = table(sweep(settings=settings))
    assert 20 < len(many.rows) <= MOST_ROWS
    assert len(json.dumps(many.rows)) <= MOST_TABLE_BYTES
    assert f"{len(many.rows)} of 898 variants" in many.about
    assert "of" not in table(sweep()).about.split("tasks.")[1]


def test_many_and_long_columns_are_bounded_too() -> None:
    tasks = [result(corpus_or_task=f"{number}" + "x" * 5000, metric="acc", value=0.5) for number in range(40)]
    wide = table([*sweep(), *tasks])
    assert len(wide.rows) == 7
    assert len(wide.rows[0]) == len(("variant", "take", "alpha")) + MOST_COLUMNS
    assert f"{MOST_COLUMNS} of 42 measures" in wide.about
    assert len(json.dumps(wide.rows)) <= MOST_TABLE_BYTES


def test_the_page_has_the_chart_on_white_and_what_to_take() -> None:
    text = page(sweep())
    (data,) = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", text)
    svg = base64.b64decode(data).decode()
    root = ElementTree.fromstring(svg)
    assert (root[0].tag.rpartition("}")[2], root[0].attrib["fill"]) == ("rect", "white")
    assert "currentColor" not in svg
    assert "| 50 % sparsity | sparsegpt0-biomedical-a1 | 92.0 ± 2.0 | 55.0 ± 2.0 | -4.3 % |" in text


def test_the_page_of_a_plan_that_publishes_says_what_decides() -> None:
    groups = groups_of(sweep(), [])
    assert "published for biomedical is decided by" in (trade_off_page(groups, published="biomedical") or "")
    assert "published" not in (trade_off_page(groups) or "")


def test_the_page_is_bounded_in_pictures_and_bytes() -> None:
    domains = [f"domain{number}" for number in range(6)]
    rows = [row for domain in domains for row in sweep(corpora=("general", domain), domain=domain)]
    text = page(rows)
    assert text.count("data:image") == MOST_PICTURES
    assert f"{MOST_PICTURES} of 6 domains" in text
    assert len(text) < MOST_PICTURES * (MOST_PICTURE_BYTES + 8000)
    assert picture(f"<svg>{'x' * MOST_PICTURE_BYTES}</svg>") is None


def test_without_a_domain_there_is_nothing_to_weigh() -> None:
    assert page([result()]) == ""


def test_files_are_named_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "report.html").touch()
    notes = ["`code` | and\nlines", *("x" * 9000 for _ in range(30))]
    text = files_page(tmp_path, {**RECORD, "notes": notes})
    assert f"- report: `{tmp_path}/report.html`" in text
    assert "models" not in text, "this run kept none"
    assert "768 calibration tokens read; moments: 3 from the cache, 4 made." in text
    assert "`'code' | and lines`" in text
    assert f"{31 - MOST_NOTES} more notes" in text
    assert len(text) < 10_000


def test_a_decision_is_said_with_its_numbers() -> None:
    decided = {
        "outcome": "kept",
        "reason": "worse: legal 27 against 25 (+8.0%), at most 0.0% is allowed",
        "variant": "sparsegpt-50-legal-a0.5",
        "model": "ab12",
        "run_dir": "runs/x",
        "perplexity": {"candidate": {"general": 90.0, "legal": 27.0}, "published": {"legal": 25.0}},
        "changes": {
            "legal": {"dense": difference(0.03), "published": difference(0.07696)},
            "general": {"dense": difference(-0.0202)},
        },
    }
    text = decision_page("legal", 7, decided)
    assert text.startswith("## legal v7: kept\n\nworse: legal 27 against 25")
    assert "| legal | worse by 3.05 ± 0.21 % | worse by 8.00 ± 0.22 % | 27.00 | 25.00 |" in text
    assert "| general | better by 2.00 ± 0.20 % | – | 90.00 | – |" in text
    first = decision_page(
        "legal", 1, decided | {"reason": "x" * 9000, "perplexity": {"candidate": {}, "published": None}}
    )
    assert len(first) < 2000
    unmeasured = {"outcome": "kept", "reason": "no validation windows", "run_dir": "runs/x", "variant": None}
    text = decision_page("legal", 1, unmeasured | {"perplexity": {"candidate": {}, "published": None}})
    assert "None" not in text


def test_a_decision_shows_among_what_it_was_made_and_marks_it() -> None:
    chosen = [dataclasses.replace(row, split="validation") for row in sweep()]
    rows = [*sweep(), *chosen]
    decided = {"outcome": "published", "reason": "better", "run_dir": "x", "variant": "gptq1-biomedical-a0.5"}
    decided["perplexity"] = {"candidate": {}, "published": None}  # type: ignore[assignment]
    text = decision_page("biomedical", 1, decided, groups_of(rows, []), choosing_columns(rows))
    lines = [
        line for line in text.splitlines() if "| dense |" in line or (line.startswith("|") and "-biomedical-a" in line)
    ]
    assert lines[0].startswith("|  | dense |  | 80.0")
    assert [line.split(" | ")[2] for line in lines][1:] == ["0", "0.5", "1"] * 2
    assert "| **published** | **gptq1-biomedical-a0.5** | 0.5 |" in text
    assert "| general, validation | biomedical, validation |" in text
    assert text.count("**published**") == 1


def difference(mean: float) -> dict[str, Any]:
    return dataclasses.asdict(PairedDifference(mean, 0.002, 32, 31))
