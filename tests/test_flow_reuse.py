"""What a run reuses: numbers without models, blocks of other run directories, and a model that is opened once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from crosscal.errors import ModelError
from crosscal.models.source import ModelSource
from crosscal.plan import CompressionPlan, load_plan
from crosscal.stages import compress
from crosscal.store import Store
from crosscal.tasks.model import identify
from crosscal.tasks.run_spec import RunSpec
from tests.helpers.processes import modules_after
from tests.helpers.tiny_place import Place, make_place, values
from tests.helpers.tiny_text import tiny_llama

ROOT = Path(__file__).parents[1]
SWEEP = [
    {"method": "sparsegpt", "sparsity": [0.5, "2:4"], "domain": "legal", "alpha": [0, 0.5]},
    {"method": "rtn", "bits": 4, "group_size": 32},
    {"method": "wanda", "sparsity": 0.5, "upstream": "sequential"},
]
VARIANTS, BLOCKS = 6, 2


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    write(place)
    return place


def write(place: Place, *, keep_models: bool = True, **more: Any) -> None:
    place.write_plan(**{"compress": SWEEP, "execution": {"device": "cpu", "keep_models": keep_models}, **more})


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(variant, block) of every real solve."""
    seen: list[tuple[str, int]] = []
    solve = compress.solve_block

    def counting(problem: Any, variants: Any) -> Any:
        seen.extend((variant.name, problem.block) for variant in variants)
        return solve(problem, variants)

    monkeypatch.setattr(compress, "solve_block", counting)
    return seen


def layers(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "layers.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, bytes]:
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in (run_dir / "models").rglob("*.safetensors")}


def test_numbers_are_found_without_a_solve_where_no_models_are_kept(place: Place, solved: list) -> None:
    """In the same run directory and in another one."""
    write(place, keep_models=False)
    place.run()
    assert len(solved) == VARIANTS * BLOCKS
    assert weights(place.run_dir) == {}
    solved.clear()
    for other in (place.run_dir, place.folder / "other"):
        place.run("--out", str(other))
        assert solved == []
        assert values(other / "results.jsonl") == values(place.run_dir / "results.jsonl")
        assert layers(other) == layers(place.run_dir)


def test_blocks_of_another_run_directory_are_taken_as_they_are(place: Place, solved: list) -> None:
    place.run()
    solved.clear()
    other, third = place.folder / "other", place.folder / "third"
    place.run("--out", str(other))
    assert solved == []
    assert weights(other) == weights(place.run_dir)
    assert layers(other) == layers(place.run_dir)

    # Blocks that are damaged or missing there are solved.
    names = ["sparsegpt-50-general", "rtn-w4g32"]
    damaged, gone = (place.run_dir / "models" / name / "block-00001.safetensors" for name in names)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    gone.unlink()
    place.run("--out", str(third))
    assert sorted(solved) == sorted((name, 1) for name in names)
    assert weights(third) == weights(other)

    # After the first directory is removed, a run in another one records that its models are there.
    solved.clear()
    shutil.rmtree(place.run_dir)
    place.run("--out", str(other))
    place.run("--out", str(place.folder / "fourth"))
    assert solved == []
    assert weights(place.folder / "fourth") == weights(other)


@pytest.mark.slow
def test_only_what_was_never_made_is_solved(place: Place, solved: list) -> None:
    write(place, keep_models=False)
    place.run()
    solved.clear()
    more = [*SWEEP, {"method": "magnitude", "sparsity": 0.5}]
    write(place, keep_models=False, compress=more)
    place.run("--out", str(place.folder / "more"))
    assert sorted(solved) == [("magnitude-50", block) for block in range(BLOCKS)]
    # Numbers on other windows need the models.
    solved.clear()
    write(place, keep_models=False, evaluate={"windows": 3})
    place.run("--out", str(place.folder / "windows"))
    assert len(solved) == VARIANTS * BLOCKS
    # So do numbers that garbage collection has removed, together with their records.
    solved.clear()
    assert any(place.startswith("objects/made/") for place, _ in Store(place.home).sweep(unused_days=0))
    place.run("--out", str(place.folder / "windows"))
    assert len(solved) == VARIANTS * BLOCKS


@pytest.mark.parametrize("blocks", [2, 5])
def test_a_run_opens_its_model_once_however_many_blocks_it_has(
    tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny_llama(tmp_path / "model", blocks=blocks)
    place.write_plan(compress=[{"method": "magnitude", "sparsity": 0.5}])
    counts: Counter[str] = Counter()

    def count(of: Any, name: str) -> None:
        real = getattr(of, name).__func__

        def counting(cls: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(cls, *args, **kwargs)

        monkeypatch.setattr(of, name, classmethod(counting))

    count(ModelSource, "open")
    count(CompressionPlan, "model_validate")
    for opened in (1, 0):  # the second run of a process has the model already
        place.run()
        # The plan is validated by the command line before anything begins, by the flow, and for the tasks.
        assert (counts["open"], counts["model_validate"] <= 3) == (opened, True)
        counts.clear()


def test_a_model_that_changes_while_a_run_reads_it_is_noticed(place: Place) -> None:
    before = RunSpec(load_plan(place.plan).model_dump(mode="json"), str(place.home))
    known = RunSpec(before.plan, before.home, model=identify(before)["model"])
    assert known.source() is before.source()
    tiny_llama(place.folder / "model", seed=1)
    with pytest.raises(ModelError, match="the model's files differ from those the run began with"):
        known.source()
    assert identify(before)["model"] != known.model


def test_a_plan_without_tasks_imports_no_lm_eval(place: Place) -> None:
    place.write_plan(compress=[{"method": "magnitude", "sparsity": 0.5}])
    assert not {"lm_eval", "datasets"} & modules_after(place.run)


def test_numbers_come_in_the_order_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    place.write_plan(corpora={"legal": "legal", "general": "general"})
    place.run()
    rows = [json.loads(line) for line in (place.run_dir / "results.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["corpus_or_task"] for row in rows)) == ["legal", "general"]
    assert list(dict.fromkeys(row["variant"] for row in rows)) == [
        *("dense", "sparsegpt-50-general", "sparsegpt-50-legal-a0.5")
    ]
