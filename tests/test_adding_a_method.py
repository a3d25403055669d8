"""A new method takes one file and one registered name; plan, solver, report and cache need no other change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from crosscal.compressors import COMPRESSORS, LayerProblem, Site, Statistic
from crosscal.compressors.recipe import alone
from crosscal.compressors.sparsity import Sparsity, pruned
from crosscal.plan.settings import described_methods
from crosscal.report.rows import LayerRow, ResultRow, read_rows
from tests.helpers.problems import layer
from tests.helpers.tiny_place import make_place


@dataclass(frozen=True)
class SignBlind:
    """Prune the weights with the lowest w² · E[x²]^power."""

    sparsity: Sparsity
    power: float = 0.5

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.SQUARE_SUM})
    version: ClassVar = 1
    compress = alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", Sparsity.parse(self.sparsity))

    def __call__(self, site: Site) -> Site:
        norm_I = site.statistics.square_I**self.power
        return site.each(lambda one: pruned(one, self.sparsity.keep_OI(one.base.weight_OI**2 * norm_I, per="row")))


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPRESSORS, "signblind", SignBlind)


def test_it_solves_from_python() -> None:
    problem: LayerProblem = layer(6, 32)
    assert COMPRESSORS["signblind"](sparsity=0.25).compress(problem).sparsity == 0.25
    assert any(method["method"] == "signblind" for method in described_methods())


def test_it_is_planned_swept_reported_and_refined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    steps = [{"method": "signblind", "sparsity": 0.5, "power": [0.5, 1.0]}, {"method": "refit"}]
    place.write_plan(compress=[{"steps": steps}])
    record = place.run()
    run = Path(record["run_dir"])
    variants = {row.variant for row in read_rows(run / "results.jsonl", ResultRow)} - {"dense"}
    assert variants == {"signblind-50-refit-general", "signblind-50-power1-refit-general"}
    rows = read_rows(run / "layers.jsonl", LayerRow)
    assert {row.method for row in rows} == {"signblind+refit"}
    assert all(row.sparsity == 0.5 and row.relative_loss > 0 for row in rows)
    assert json.loads((run / "run.json").read_text())["cache"]["misses"] > 0
    assert torch.tensor([row.loss for row in rows]).isfinite().all()
