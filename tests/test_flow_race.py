"""Laws of `evaluate: race` in whole runs: they choose what runs without it choose, rows state what each variant
was measured on, no window is measured twice, and test text chooses nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosscal.evaluation import TEST, Measurement
from crosscal.evaluation.batches import Batch
from crosscal.evaluation.likelihood import Windows
from crosscal.report.headline import best_variants
from crosscal.report.rows import NOT_EVALUATED, ResultRow, WindowRow, read_rows
from crosscal.report.run_files import read_run
from crosscal.resources import ROOT
from crosscal.stages import compress
from tests.helpers.tiny_place import Place, crosscal, values

pytestmark = pytest.mark.slow

CORPORA, WINDOWS, VALIDATION = ("general", "biomedical"), 4, 16
SWEEP = [
    {"method": "sparsegpt", "sparsity": 0.8, "domain": "biomedical", "alpha": [0, 0.5, 1]},
    {"method": "magnitude", "sparsity": 0.5},  # the only one of its level
    {"method": "wanda", "sparsity": 0.8, "domain": "biomedical", "alpha": 0.5},
    {"method": "magnitude", "sparsity": 0.8},
]
VARIANTS = 6
Read = Counter[tuple[str, str]]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """(corpus, split) -> number of windows that models were measured on."""
    seen: Read = Counter()
    plain: Callable[..., list[Batch]] = Windows.batches

    def batches(self: Windows, *given: Any) -> list[Batch]:
        seen[self.name, self.split] += self.items
        return plain(self, *given)

    monkeypatch.setattr(Windows, "batches", batches)
    return seen


def make(folder: Path, name: str = "run", *, race: bool = True, keep_models: bool = True) -> Place:
    """A place of its own for each name, with the demo's trained model; places of one folder share a store."""
    place = Place(folder / name)
    place.folder.mkdir()
    (place.folder / "home").symlink_to(folder)
    demo = ROOT / "data" / "demo"
    facts = (demo / "tasks" / "biomedical_facts.jsonl").read_text().splitlines()[:4]
    (place.folder / "facts.jsonl").write_text("\n".join(facts) + "\n")
    place.write_plan(
        model=str(demo / "model"),
        corpora={name: str(demo / "corpora" / name) for name in CORPORA},
        calibration={"windows": 8, "length": 64, "held_out_windows": 1},
        compress=SWEEP,
        evaluate={"windows": WINDOWS, "validation_windows": VALIDATION, "race": race, "tasks": ["facts.jsonl"]},
        execution={"device": "cpu", "keep_models": keep_models},
    )
    return place


def results(place: Place) -> list[ResultRow]:
    return read_rows(place.run_dir / "results.jsonl", ResultRow)


def left(place: Place) -> dict[str, str]:
    """Variant -> why it left the race."""
    return {row.variant: row.skipped for row in results(place) if row.skipped and "left the race" in row.skipped}


def taken(place: Place) -> list[tuple[str, str, str]]:
    groups = read_run(place.run_dir).groups
    return [(one.level, one.group.name, one.lowest.name) for one in best_variants(groups, "biomedical")]


def total(place: Place) -> Read:
    """(corpus, split) -> windows that the rows state, over the compressed models and the dense one."""
    found: Read = Counter()
    for row in results(place):
        if row.metric == "perplexity":
            found[row.corpus_or_task, row.split] += row.windows or 0
    return found


def test_a_race_chooses_as_without_one_and_measures_each_window_once(tmp_path: Path, read: Read) -> None:
    raced, plain, again = (make(tmp_path, name, race=race) for name, race in [("a", True), ("b", False), ("c", True)])
    record = raced.run()
    assert left(raced), "a sweep in which nobody leaves shows nothing"
    assert "sparsegpt-80-general" not in left(raced)
    assert "magnitude-50" not in left(raced), "there is nothing at its level to be worse than"
    assert any("not evaluated" in note and all(name in note for name in left(raced)) for note in record["notes"])
    assert read == total(raced)
    windows = {
        (w.variant, w.corpus, w.split): len(w.nll) for w in read_rows(raced.run_dir / "windows.jsonl", WindowRow)
    }
    for row in (row for row in results(raced) if row.metric == "perplexity"):
        assert row.windows == windows.get((row.variant, row.corpus_or_task, row.split), 0)
        if row.variant in left(raced):
            assert row.value is None
            assert (row.skipped or "").startswith(NOT_EVALUATED)
            assert row.windows == 0 if row.split == TEST else 4 <= (row.windows or 0) <= VALIDATION
        else:
            assert row.windows == (WINDOWS if row.split == TEST else VALIDATION)
    assert min(row.windows or 0 for row in results(raced) if row.split != TEST) < VALIDATION
    assert {row.variant for row in results(raced) if row.metric == "acc"}.isdisjoint(left(raced))
    assert "left the race after" in (raced.run_dir / "report.html").read_text()

    plain.run()
    assert not left(plain)
    models = VARIANTS + 1
    assert read == Counter({(c, s): models * n for c in CORPORA for s, n in (("test", WINDOWS), ("validation", 16))})
    assert taken(raced) == taken(plain)
    before = dict(read)
    again.run()
    assert dict(read) == before, "all of it is in the store"
    assert values(again.run_dir / "results.jsonl") == values(raced.run_dir / "results.jsonl")
    ours, theirs = ({(v, c, s): x for v, c, s, _, x, *_ in values(p.run_dir / "results.jsonl")} for p in (raced, plain))
    assert all(theirs[place] == pytest.approx(value, rel=1e-6) for place, value in ours.items() if value is not None)


STOPS = 7, 17
"""Measurements at which a run stops: during the first look, and after it."""


class Stopped(Exception):
    pass


def test_a_race_that_was_interrupted_goes_on(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are not kept, which is the hardest case: a run after the race measures nothing again."""
    (tmp_path / "other").mkdir()
    whole = make(tmp_path / "other", "whole")
    whole.run()
    expected = dict(read)
    read.clear()
    plain, calls = Windows.result, 0

    def result(self: Windows, *given: Any) -> list[Measurement]:
        nonlocal calls
        calls += 1
        if calls in STOPS:
            raise Stopped
        return plain(self, *given)

    place = make(tmp_path, keep_models=False)
    with monkeypatch.context() as patch:
        patch.setattr(Windows, "result", result)
        for _ in STOPS:
            with pytest.raises(Stopped):
                place.run()
    place.run()
    assert values(place.run_dir / "results.jsonl") == values(whole.run_dir / "results.jsonl")
    kept = dict(read)
    assert all(n - expected[where] <= len(STOPS) * VALIDATION for where, n in kept.items()), (
        "at most what was being read"
    )
    with monkeypatch.context() as patch:
        patch.setattr(compress, "solve_block", lambda *_: pytest.fail("solved again"))
        place.run()
    assert dict(read) == kept
    assert values(place.run_dir / "results.jsonl") == values(whole.run_dir / "results.jsonl")


def test_race_ignores_test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clean").mkdir()
    (tmp_path / "poisoned").mkdir()
    clean, poisoned = make(tmp_path / "clean"), make(tmp_path / "poisoned")
    clean.run()
    plain, number = Windows.result, 0

    def result(self: Windows, answers: Any, seconds: float) -> list[Measurement]:
        nonlocal number
        found, number = plain(self, answers, seconds), number + 1
        if self.split != TEST:
            return found
        nll = tuple(float((number * 7919) % 13) + i for i in range(self.items))
        return [dataclasses.replace(one, value=float(number), window_nll=nll) for one in found]

    monkeypatch.setattr(Windows, "result", result)
    poisoned.run()
    tests = [[row.value for row in results(place) if row.split == TEST] for place in (clean, poisoned)]
    assert tests[0] != tests[1]
    assert left(poisoned) == left(clean)
    assert taken(poisoned) == taken(clean)


def test_a_study_measures_all(tmp_path: Path) -> None:
    place = make(tmp_path)
    done = crosscal(
        "study",
        str(place.plan),
        "--home",
        str(place.home),
        "--set",
        "study.draws=2",
        "--set",
        "execution.keep_models=false",
    )
    assert done.code == 2
    assert "a study measures every variant on every window" in done.err
