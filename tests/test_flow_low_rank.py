"""Runs of plans with low-rank parts and outliers: made, measured together with the base, and taken from another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosscal.models import load_variant
from tests.helpers.tiny_place import crosscal, make_place, values
from tests.helpers.tiny_text import tiny_tokenizer
from tests.helpers.written_models import contents

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_a_plan_makes_measures_and_takes_them_again(tmp_path: Path) -> None:
    """From the command line: base and adapter are evaluated together, also with blocks taken from another run."""
    place = make_place(tmp_path)
    steps = [{"method": "sparsegpt", "sparsity": 0.7}, {"method": "eora", "rank": [0, 16]}]
    place.write_plan(compress=[{"domain": "legal", "upstream": ["dense", "sequential"], "steps": steps}])
    place.run()
    place.run("--out", str(tmp_path / "other"))
    assert contents(tmp_path / "other" / "models") == contents(place.run_dir / "models")
    assert values(tmp_path / "other" / "results.jsonl") == values(place.run_dir / "results.jsonl")
    plain, repaired = (f"sparsegpt-70-eora-rank{rank}-legal-a0.5" for rank in (0, 16))
    bases = [contents(place.run_dir / "models" / name) for name in (plain, repaired)]
    assert bases[0] == {name: content for name, content in bases[1].items() if not name.startswith("adapter/")}
    assert measured(place.run_dir, plain) != measured(place.run_dir, repaired)
    # Merged into dense matrices, and evaluated as a separate model.
    model = load_variant(place.run_dir / "models" / repaired)
    for linear in (linear for linear in model.modules() if hasattr(linear, "low_rank_left_OK")):
        linear.weight.data += linear.low_rank_left_OK @ linear.low_rank_right_KI
    model.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    place.write_plan(model=str(tmp_path / "merged"), compress=[])
    place.run("--out", str(tmp_path / "of the merged"))
    expected = measured(tmp_path / "of the merged", "dense")
    assert measured(place.run_dir, repaired) == pytest.approx(expected, rel=1e-4)


def measured(run_dir: Path, variant: str) -> list[float]:
    return [row[4] for row in values(run_dir / "results.jsonl") if row[0] == variant]


def test_plan_check_names_what_is_written_dense(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.write_plan(compress=[{"method": ["spqr", "gptq"], "bits": 3, "group_size": 16}])
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["written_dense"]["variants"] == ["spqr-w3g16-general"]
