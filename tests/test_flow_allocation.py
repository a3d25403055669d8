"""A sparsity allocated over the blocks: local, sequential, reused, killed and zero-spread runs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscal.calibration.sets import windows_by_key
from crosscal.compressors import OWL
from crosscal.errors import PlanError
from crosscal.plan import parse_plan
from crosscal.report.rows import LayerRow, read_rows
from crosscal.stages import compress
from crosscal.store import Store
from crosscal.variants import variants
from tests.helpers.processes import PROCESSES
from tests.helpers.tiny_models import load_plain, plain_grams
from tests.helpers.tiny_place import Place, crosscal, make_place, run_alone, values
from tests.helpers.tiny_text import tiny_llama, tiny_tokenizer

BLOCKS, THRESHOLD, SPREAD = 3, 3.0, 0.1
OWL_ENTRY = {"method": "owl", "threshold": THRESHOLD, "spread": SPREAD}
OF = {"domain": "legal", "alpha": 0.5}


def entry(allocator: Mapping[str, Any] | None, sparsity: Any = 0.6, **more: Any) -> dict[str, Any]:
    first = [] if allocator is None else [dict(allocator)]
    return {**OF, "steps": [*first, {"method": "sparsegpt", "sparsity": sparsity}], **more}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A model whose blocks differ in the tails of their weights, so that the allocation is not uniform."""
    place = make_place(tmp_path)
    shutil.rmtree(tmp_path / "model")
    model = tiny_llama(blocks=BLOCKS)
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            for weight in (parameter for parameter in block.parameters() if parameter.ndim == 2):
                weight.copy_(weight.sign() * (weight.abs() / 0.2) ** (1 + number / 2) * 0.2)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    place.write_plan(compress=[entry(OWL_ENTRY)])
    return place


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each block that OWL summarised."""
    seen: list[str] = []
    summarise = OWL.summarise

    def counting(self: OWL, block: Any) -> dict[str, float]:
        seen.append(block[0].name)
        return summarise(self, block)

    monkeypatch.setattr(OWL, "summarise", counting)
    return seen


def rows(run_dir: Path) -> dict[str, list[LayerRow]]:
    found: dict[str, list[LayerRow]] = {}
    for row in read_rows(run_dir / "layers.jsonl", LayerRow):
        found.setdefault(row.variant, []).append(row)
    return found


def by_block(layers: list[LayerRow]) -> list[float]:
    """Return the share of zeros of each block."""
    zeros, weights = Counter[int](), Counter[int]()
    for row in layers:
        zeros[row.block] += round(row.sparsity * (row.parameters or 0))
        weights[row.block] += row.parameters or 0
    return [zeros[block] / weights[block] for block in sorted(weights)]


def weights_of(run_dir: Path, variant: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run_dir / "models" / variant).glob("*.safetensors")}


def expected_sparsities(place: Place, target: float) -> list[float]:
    """Return OWL's sparsities as published, from plain forward passes over the run's windows, in float64."""
    model, mixed = load_plain(place.folder / "model"), Counter[str]()
    for sample in json.loads((place.run_dir / "identity.json").read_text())["sets"]:
        windows = windows_by_key(Store(place.home), sample["calibration"]["apart"][0]["key"])
        grams, tokens = plain_grams(model, windows)
        for name, gram_II in grams.items():
            mixed[name] += 0.5 * gram_II.diagonal() / tokens[name]  # pyright: ignore[reportArgumentType]
    ratios = []
    for block in range(BLOCKS):
        own = [name for name in mixed if f"layers.{block}." in name]
        scores = torch.cat(
            [(model.get_parameter(f"{name}.weight").abs() * mixed[name].sqrt()).flatten() for name in own]  # pyright: ignore
        )
        ratios.append(float((scores > THRESHOLD * scores.mean()).double().mean()))
    scaled = [(ratio - min(ratios)) / (max(ratios) - min(ratios)) * 2 * SPREAD for ratio in ratios]
    return [target - (each - statistics.mean(scaled)) for each in scaled]


def test_every_block_has_the_sparsity_that_the_paper_says_and_the_model_the_target(place: Place) -> None:
    place.write_plan(compress=[entry(OWL_ENTRY, [0.5, 0.7])])
    place.run()
    for target in (0.5, 0.7):
        own = rows(place.run_dir)[f"owl-spread0.1-threshold3-sparsegpt-{100 * target:g}-legal-a0.5"]
        expected = expected_sparsities(place, target)
        assert max(expected) - min(expected) == pytest.approx(2 * SPREAD)
        for row in own:
            assert row.parameters is not None
            assert round(row.sparsity * row.parameters) == round(expected[row.block] * row.parameters)
            assert row.setting["sparsity"] == target
        total = sum(row.parameters or 0 for row in own)
        removed = sum(row.sparsity * (row.parameters or 0) for row in own)
        assert abs(removed - target * total) <= len(own) / 2


def test_no_spread_writes_the_bytes_of_no_allocator(place: Place) -> None:
    place.write_plan(
        compress=[entry(None), entry({"method": "owl", "spread": 0}), entry({"method": "dlp", "spread": 0})]
    )
    place.run()
    plain = weights_of(place.run_dir, "sparsegpt-60-legal-a0.5")
    assert plain
    for name in ("owl-spread0-sparsegpt-60-legal-a0.5", "dlp-spread0-sparsegpt-60-legal-a0.5"):
        assert {n: b for n, b in weights_of(place.run_dir, name).items() if n.startswith("block")} == {
            n: b for n, b in plain.items() if n.startswith("block")
        }


def test_blocks_are_looked_at_once_whatever_is_solved_from_it(place: Place, looked_at: list[str]) -> None:
    """Other sparsities, methods and run directories reuse the summaries; other settings of the allocator do not."""
    place.write_plan(compress=[entry(OWL_ENTRY, [0.5, 0.6])])
    place.run()
    assert len(looked_at) == BLOCKS
    looked_at.clear()
    more = {**OF, "steps": [OWL_ENTRY, {"method": "wanda", "sparsity": 0.5}, {"method": "refit"}]}
    place.write_plan(compress=[entry(OWL_ENTRY, [0.5, 0.6, 0.8]), more, entry(OWL_ENTRY, upstream="sequential")])
    place.run("--out", str(place.folder / "more"))
    assert looked_at == []
    place.write_plan(compress=[entry({**OWL_ENTRY, "per": "layer"}), entry({**OWL_ENTRY, **OF, "alpha": 1})])
    place.run("--out", str(place.folder / "others"))
    assert len(looked_at) == 2 * BLOCKS


def test_inputs_that_come_through_compressed_blocks_change_no_allocation(place: Place) -> None:
    place.write_plan(compress=[entry(OWL_ENTRY, upstream=["dense", "sequential"])])
    place.run()
    dense, sequential = rows(place.run_dir).values()
    assert [row.sparsity for row in dense] == [row.sparsity for row in sequential]
    assert [row.loss for row in dense] != [row.loss for row in sequential]
    assert len(set(by_block(dense))) == BLOCKS


@pytest.mark.parametrize("keep_models", [True, False])
def test_what_an_earlier_run_made_is_found_without_a_look_or_a_solve(
    place: Place, keep_models: bool, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write_plan(compress=[entry(OWL_ENTRY)], execution={"device": "cpu", "keep_models": keep_models})
    place.run()
    first = values(place.run_dir / "results.jsonl")
    for _, key in Store(place.home).keys("summaries"):
        Store(place.home).discard("summaries", key)
    looked_at.clear()
    monkeypatch.setattr(compress, "solve_block", None)
    place.run("--out", str(place.folder / "other"))
    assert looked_at == []
    assert values(place.folder / "other" / "results.jsonl") == first


@pytest.mark.slow
def test_killed_between_the_phases_it_ends_the_same(place: Place) -> None:
    """Killed once while blocks are summarised, once while they are solved."""
    chance = random.Random(0)
    moments = (
        lambda: any(place.home.glob("objects/summaries/*")),
        lambda: any(place.run_dir.glob("models/*/block-*.safetensors")),
    )
    place.write_plan(compress=[entry(OWL_ENTRY, [0.5, 0.6, 0.7]), entry(OWL_ENTRY, 0.7, upstream="sequential")])
    for is_time in moments:
        process = PROCESSES.Process(target=run_alone, args=(place, place.run_dir))
        process.start()
        deadline = time.monotonic() + 90
        while not is_time() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    place.run()
    calm = place.folder / "calm"
    place.run("--home", str(place.folder / "home2"), "--out", str(calm))
    assert values(calm / "results.jsonl") == values(place.run_dir / "results.jsonl")
    for variant in rows(calm):
        assert weights_of(calm, variant) == weights_of(place.run_dir, variant)
    assert all(problem is None for _, _, problem in Store(place.home).verify())


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"method": "owl"}], "no later step"),
        ([{"method": "owl"}, {"method": "gptq", "bits": 4}], "no later step"),
        ([{"method": "owl"}, {"method": "sparsegpt", "sparsity": "2:4"}], r"n:m, which is the same .*got 2:4"),
        (
            [{"method": "wanda", "sparsity": 0.5}, {"method": "dlp"}],
            "dlp uses the dense matrices",
        ),
        ([{"method": "owl"}, {"method": "dlp"}, {"method": "wanda", "sparsity": 0.5}], "must be the first step"),
        (
            [{"method": "owl"}, {"method": "refit"}, {"method": "wanda", "sparsity": 0.5}],
            "the result of an earlier step",
        ),
        ([{"method": "owl", "spread": 2}, {"method": "wanda", "sparsity": 0.5}], r"steps\.0: `spread` is 0 to 1"),
        ([{"method": "owl", "alpha": 1}, {"method": "wanda", "sparsity": 0.5}], None),
        ([{"method": "dlp"}, {"method": "magnitude", "sparsity": 0.5}, {"method": "refit"}], None),
    ],
)
def test_a_plan_says_what_an_allocator_needs(steps: list[dict[str, Any]], says: str | None) -> None:
    plan = parse_plan({"model": "m", "corpora": {"general": None, "legal": None}, "compress": [{**OF, "steps": steps}]})
    if says is None:
        assert len(variants(plan)) == 1
    else:
        with pytest.raises(PlanError, match=says):
            variants(plan)


def test_the_command_line_says_it_in_one_message(place: Place) -> None:
    place.write_plan(compress=[entry(OWL_ENTRY, "2:4")])
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home))
    assert done.code == 2
    assert "cannot distribute n:m" in done.err
    assert "Traceback" not in done.err
