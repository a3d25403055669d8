"""Plans whose steps need pairs of dense and compressed inputs: memory and disk, refusals, and a `qep` run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscal.errors import PlanError
from crosscal.models import ModelSource
from crosscal.plan import parse_plan
from crosscal.report.rows import LayerRow, read_rows
from crosscal.stages.preflight import BlockShape, moments_bytes, reading_bytes, solving_bytes
from crosscal.stages.spill import spill_folder
from crosscal.statistics import EVERY, OF_TWO_STREAMS
from crosscal.tasks.refusals import unpaired
from crosscal.variants import variants
from tests.helpers.corrected_variants import CORRECTED, PLAIN
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_run import tiny_source, windows

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"))


def test_memory_and_disk_of_pairs_are_counted(source: ModelSource, tmp_path: Path) -> None:
    shape = BlockShape("block", (("mlp.down_proj", 512), ("mlp.up_proj", 256)), 600_000, 1_200_000)
    matrix = (512**2 + 256**2) * 4
    both = EVERY | OF_TWO_STREAMS
    assert shape.summed_bytes(both) - shape.summed_bytes(EVERY) == 2 * matrix
    stored = moments_bytes([shape], 1, both) - moments_bytes([shape], 1, EVERY)
    assert stored == pytest.approx(3 * 0.42 * matrix, abs=4000)  # `cross` stores two triangles, `drift` one
    states = {"outside": 0, "hidden": 64, "tokens": 1000, "sets": 1, "itemsize": 4}
    more = reading_bytes([shape], statistics=both, **states) - reading_bytes([shape], statistics=EVERY, **states)
    assert more == 64 * 1000 * 4 + 2 * matrix
    one, two = (solving_bytes([shape] * 2, [CORRECTED], lanes=1, statistics=each) for each in (EVERY, both))
    assert two > one
    needed, windows_SL = 2 * 64 * 32 * source.config.hidden_size * 4, [windows(64, seed=0)]
    places = [
        spill_folder(source, windows_SL, dtype=torch.float32, device="cpu", free=needed, folder=tmp_path, streams=n)
        for n in (1, 2)
    ]
    assert places == [None, tmp_path]


def plan(**entry: Any) -> dict[str, Any]:
    entry = {"steps": [{"method": "qep"}, {"method": "gptq", "bits": 4, "group_size": 32}]} | entry
    return {"model": "m", "corpora": {"general": "g"}, "compress": [entry]}


@pytest.mark.parametrize("upstream", ["dense", ["sequential", "dense"], None])
def test_a_dense_upstream_is_refused(upstream: Any) -> None:
    said = {} if upstream is None else {"upstream": upstream}
    with pytest.raises(PlanError, match="a dense upstream has none") as caught:
        variants(parse_plan(plan(**said)))
    assert caught.value.where == "compress.0"
    assert "sequential" in str(caught.value.do)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([{"method": "qep"}], "before it is pruned or rounded"),
        ([{"method": "gptq", "bits": 4}, {"method": "qep"}], "before it is pruned or rounded"),
        ([{"method": "qep"}, {"method": "gptq", "bits": 4}, {"method": "bias"}], "mean is not collected"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(steps: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        variants(parse_plan(plan(steps=steps, upstream="sequential")))


def test_experts_are_refused_before_anything_is_read() -> None:
    [error] = unpaired([PLAIN, CORRECTED], ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"])
    assert "no pairs" in str(error)
    assert error.got == "corrected"
    assert not list(unpaired([PLAIN], ["model.layers.0.mlp.experts"]))
    assert not list(unpaired([CORRECTED], []))


def check(place: Place) -> dict[str, Any]:
    return json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)


def rows(record: Mapping[str, Any]) -> list[LayerRow]:
    return read_rows(Path(record["run_dir"]) / "layers.jsonl", LayerRow)


def test_a_run_corrects_and_says_what_its_losses_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    rounding = {"method": "gptq", "bits": 3, "group_size": 32}
    common = {"domain": "legal", "alpha": 0.5, "upstream": "sequential"}
    place.write_plan(compress=[{**rounding, **common}])
    before = check(place)
    place.write_plan(compress=[{**rounding, **common}, {"steps": [{"method": "qep"}, rounding], **common}])
    after = check(place)
    assert set(after["sums"]) == set(before["sums"]) | {"cross", "drift"}
    assert not after["problems"]
    for kind, which in (("memory", "reading_bytes"), ("memory", "solving_bytes"), ("disk", "store_bytes")):
        assert after[kind][which] > before[kind][which]
    first = place.run()
    names = {row.variant for row in rows(first)}
    corrected = next(name for name in names if name.startswith("qep-"))
    assert len(names) == 2
    assert any(corrected in note and "dense model's outputs" in note for note in first["notes"])
    assert all(row.relative_loss is not None and row.heldout_relative_loss is not None for row in rows(first))
    assert corrected in (place.run_dir / "report.html").read_text()
    again = place.run("--out", str(tmp_path / "again"))
    assert again["calibration_tokens_read"] == 0

    place.write_plan(compress=[{"steps": [{"method": "qep"}, rounding], "domain": "legal", "alpha": 0.5}])
    for command in (("plan", "check"), ("run",)):
        done = crosscal(*command, str(place.plan), "--home", str(place.home))
        assert done.code != 0
        assert "upstream: sequential" in done.err + done.out
        assert "Traceback" not in done.err
