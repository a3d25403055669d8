"""Rows: files read back as written, are written completely or not at all, and contain finite numbers only."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from crosscal.errors import CrosscalError, UsageError
from crosscal.report import LayerRow, ResultRow, read_rows, write_rows
from crosscal.report.rows import Row
from tests.helpers.made_up_run import layer, result, sweep

RESULTS = [*sweep(), result(value=None, stderr=None, skipped="no network"), result("naïve ☃ <b>")]
LAYERS = [layer("a", 0, "mlp.up_proj"), layer("a", None, "lm_head", fallback="keep-dense", heldout_relative_loss=None)]


@pytest.mark.parametrize(("rows", "kind"), [(RESULTS, ResultRow), (LAYERS, LayerRow), ([], LayerRow)])
def test_round_trip(tmp_path: Path, rows: list[Row], kind: type[Row]) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl", kind) == rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [{"value": "x"}, {"setting": {"damping": "x"}}])
def test_a_number_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path: Path, bad: float, place: dict) -> None:
    path = tmp_path / "results.jsonl"
    write_rows(path, RESULTS[:1])
    before = path.read_bytes()
    changes = {key: {"damping": bad} if isinstance(value, dict) else bad for key, value in place.items()}
    with pytest.raises(CrosscalError, match="not finite, nothing was written"):
        write_rows(path, [*RESULTS, result("broken", **changes)])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_a_writer_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    write_rows(path, RESULTS[:1])
    before = path.read_bytes()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_rows(path, RESULTS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.jsonl"]


def test_a_row_of_a_later_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_rows(path, RESULTS[:1])
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_field": 1}), encoding="utf-8")
    assert read_rows(path, ResultRow) == RESULTS[:1]


def test_a_row_without_the_optional_fields_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_rows(path, RESULTS[:1])
    row = json.loads(path.read_text())
    del row["skipped"]
    path.write_text(json.dumps(row), encoding="utf-8")
    assert read_rows(path, ResultRow) == RESULTS[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"variant": "dense"}', "line 2: no method, setting, .* in a ResultRow"),
        ("{", "line 2: not a line of JSON"),
        ("3", "line 2: not an object"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    write_rows(path, RESULTS[:1])
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_rows(path, ResultRow)
