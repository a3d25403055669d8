"""`crosscal plan check` reports what a run will do, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from crosscal.corpora import ingest
from crosscal.models import ModelSource
from crosscal.stages.moments import CachedMoments, collect_moments
from crosscal.stages.preflight import (
    BlockShape,
    block_shapes,
    blocks_at_once,
    moments_bytes,
    reading_bytes,
    solving_bytes,
)
from crosscal.statistics import VECTORS
from crosscal.store import Store
from tests.helpers.tiny_models import FAMILIES, save_model, windows
from tests.helpers.tiny_place import Place, check, make_place, write_documents
from tests.helpers.tiny_run import variant
from tests.helpers.tiny_text import tiny_llama

DEMO_MODEL = Path(__file__).parents[1] / "data" / "demo" / "model"
DISK_FACTOR = 1.25
"""Maximum factor between estimate and stored bytes: how well moments compress depends on the text."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def states(found: dict) -> list[tuple[str, int]]:
    return [(each["state"], each["tokens_to_read"]) for each in found["reading"]]


def stored_bytes(home: Path, kind: str) -> int:
    return sum(file.stat().st_size for file in (home / "objects" / kind).glob("*/*.arrow"))


def test_it_says_what_a_run_reads_and_a_run_reads_that(place: Place) -> None:
    before = check(place)
    assert before["problems"] == []
    assert before["variants"] == ["sparsegpt-50-general", "sparsegpt-50-legal-a0.5"]
    assert states(before) == [("not ingested yet", 12 * 32)] * 2
    assert not place.home.exists(), "checking writes nothing"

    record = place.run()
    assert record["calibration_tokens_read"] == before["calibration_tokens_to_read"]
    after = check(place)
    assert states(after) == [("cached", 0)] * 2
    assert after["disk"]["store_bytes"] == 0

    moved = check(place, "--set", "calibration.seed=1")
    assert states(moved) == [("not sampled yet", 12 * 32)] * 2


def test_a_landed_document_is_counted_by_the_same_rule_as_the_run(place: Place) -> None:
    place.run()
    write_documents(place.folder / "legal" / "train-2.jsonl", seed="new", count=30)
    write_documents(place.folder / "legal" / "validation-2.jsonl", seed="new-validation", count=10)
    record = place.run("--out", str(place.folder / "run2"))
    assert 0 < record["calibration_tokens_read"] < 12 * 32
    assert states(check(place)) == [("cached", 0)] * 2


def test_windows_that_the_model_shortens_are_told_before_and_after_the_run(place: Place) -> None:
    place.write_plan(calibration={"windows": 2, "length": 2048, "held_out_windows": 1}, evaluate={"windows": 2})
    note = "indows have 128 tokens instead of 2048: the model takes no more."
    before = check(place)
    assert before["model"]["notes"] == [f"W{note}"]
    record = place.run()
    assert record["calibration_tokens_read"] == before["calibration_tokens_to_read"] == 2 * 3 * 128
    assert [said for said in record["notes"] if note in said] == [
        f"Evaluation w{note}", f"general: W{note}", f"legal: W{note}"
    ]  # fmt: skip


def test_sequential_variants_read_again(place: Place) -> None:
    place.write_plan(compress=[{"method": "wanda", "sparsity": 0.5, "upstream": "sequential"}])
    before = check(place)
    assert before["calibration_tokens_to_read"] == 2 * 12 * 32
    record = place.run()
    assert record["calibration_tokens_read"] == 2 * 12 * 32
    assert states(check(place)) == [("cached", 0), ("at most", 12 * 32)]


def test_sequential_variants_read_the_mixtures_of_their_steps_again(place: Place) -> None:
    steps = [{"method": "wanda", "sparsity": 0.5}, {"method": "refit", "mixture": {"general": 1.0}}]
    place.write_plan(compress=[{"steps": steps, "mixture": {"legal": 1.0}, "upstream": "sequential"}])
    before = check(place)
    assert states(before)[-1] == ("at most", 2 * 12 * 32)
    assert place.run()["calibration_tokens_read"] == before["calibration_tokens_to_read"] == 4 * 12 * 32


def test_tokens_that_need_no_corpus(place: Place) -> None:
    corpora = {"noise": "random", "own": "self"}
    mixture = {"noise": 0.5, "own": 0.5}
    place.write_plan(
        corpora=corpora,
        compress=[{"method": "wanda", "sparsity": 0.5, "mixture": mixture}],
        evaluate={"perplexity": []},
    )
    assert states(check(place)) == [("not sampled yet", 12 * 32)] * 2
    assert place.run()["calibration_tokens_read"] == 2 * 12 * 32
    assert states(check(place)) == [("cached", 0)] * 2


def test_text_that_the_model_writes_is_found_by_all_of_its_settings(place: Place) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(place.folder / "model")  # on a CPU it writes in float32

    def asked(**settings: object) -> None:
        place.write_plan(
            corpora={"own": {"source": "self", **settings}},
            compress=[{"method": "wanda", "sparsity": 0.5, "mixture": {"own": 1.0}}],
            evaluate={"perplexity": []},
        )

    asked()
    place.run()
    assert states(check(place)) == [("cached", 0)]
    for other in ({"t_init": 0.2, "t_final": 0.2}, {"first_tokens": []}):
        asked(**other)
        assert states(check(place)) == [("not sampled yet", 12 * 32)]


def test_the_disk_estimate_is_near_what_is_stored(place: Place) -> None:
    place.write_plan(model=str(DEMO_MODEL))  # 128 and 384 inputs; headers would dominate smaller matrices
    estimate = check(place)["disk"]
    place.run()
    stored = stored_bytes(place.home, "moments")
    assert stored / DISK_FACTOR < estimate["store_bytes"] < stored * DISK_FACTOR
    models = sum(file.stat().st_size for file in (place.run_dir / "models").glob("*/*.safetensors"))
    assert models / DISK_FACTOR < estimate["models_bytes"] < models * DISK_FACTOR


def test_problems_are_all_told_with_a_remedy(place: Place) -> None:
    place.write_plan(
        corpora={"general": "general", "legal": "gone.jsonl"},
        compress=[
            {"method": ["rtn", "gptq"], "bits": 4, "group_size": [24, 32]},
            {"method": "wanda", "sparsity": "1:5"},
        ],
        evaluate={"tasks": ["gone_too.jsonl"]},
    )
    problems = check(place, code=1)["problems"]
    assert len(problems) == 6, problems  # one per setting and input width, not per layer and variant
    for text in ("gone.jsonl", "group_size", "1:5", "gone_too.jsonl"):
        assert any(text in problem for problem in problems)
    place.write_plan(model="./nothing")
    assert "no such model" in check(place, code=1)["problems"][0]


def test_shortages_are_problems(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    problems = check(place, code=1)["problems"]
    assert [problem.split(" (got")[0] for problem in problems] == [
        "too little memory for reading on cpu",
        "too little memory for solving on cpu",
        "too little memory for evaluating on cpu",
        "too little disk for the store",
        "too little disk for the run directory",
    ]


def sites_by_walking(folder: Path, home: Path) -> Iterator[list[tuple[str, int]]]:
    source, store = ModelSource.open(folder), Store(home)
    cached = CachedMoments(store, source.digest, "dense", "float32")
    with store.publish("calibration", "0" * 64, {}) as staged:
        from crosscal.calibration.sets import _write_windows

        _write_windows(staged / "windows.arrow", windows(1))
    collect_moments(cached, source, ["0" * 64], device="cpu", batch_tokens=64, report=lambda *_: None)
    for block in range(source.blocks):
        yield [(site.name, site.inputs) for site in cached.sites(block) or ()]


EXACT = ("llama", "gpt2", "opt", "gpt-neox", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shapes_of_a_model_never_calibrated(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    source = ModelSource.open(folder)
    unseen = CachedMoments(Store(tmp_path / "empty"), source.digest, "dense", "float32")
    guessed = block_shapes(source, unseen)
    walked = list(sites_by_walking(folder, tmp_path / "home"))
    known = sum(inputs**2 for sites in walked for _, inputs in sites)
    guess = sum(inputs**2 for shape in guessed for _, inputs in shape.sites)
    if family in EXACT:
        widths = [sorted(inputs for _, inputs in sites) for sites in walked]
        assert [sorted(inputs for _, inputs in shape.sites) for shape in guessed] == widths
    assert known / 1.34 <= guess <= known * 1.34
    seen = CachedMoments(Store(tmp_path / "home"), source.digest, "dense", "float32")
    assert [list(shape.sites) for shape in block_shapes(source, seen)] == walked


def test_the_formulas_on_a_model_of_seven_billion_parameters() -> None:
    sites = (("q_proj", 4096), ("o_proj", 4096), ("gate_proj", 4096), ("down_proj", 11008))
    block = BlockShape("model.layers.0", sites, parameters=202_383_360, stored_bytes=404_766_720)
    gram_bytes = 4 * (3 * 4096**2 + 11008**2)
    assert block.gram_bytes == gram_bytes
    vector_bytes, headers = 3 * 4 * (3 * 4096 + 11008), 4 * 1800
    assert moments_bytes([block] * 32, 2, VECTORS) == 64 * (vector_bytes + headers)
    assert moments_bytes([block] * 32, 2) == pytest.approx(64 * (0.42 * gram_bytes + vector_bytes + 2 * headers))
    model = {"outside": 262_144_000, "hidden": 4096, "tokens": 144 * 2048, "sets": 2, "itemsize": 2}
    reading = reading_bytes([block] * 32, **model)
    assert reading == 144 * 2048 * 4096 * 2 + 2 * 202_383_360 * 2 + 2 * (gram_bytes + 2 * vector_bytes)
    at_first = 2 * (262_144_000 + 202_383_360)  # outside the blocks, and one block: more than two blocks' vectors
    assert reading_bytes([block] * 32, **model, statistics=VECTORS) == 144 * 2048 * 4096 * 2 + at_first
    sweep = [variant(f"a{alpha}", "sparsegpt", {"general": 1 - alpha, "legal": alpha}) for alpha in (0.25, 0.5, 0.75)]
    loop = 3 * 202_383_360 // 2  # weights before, change, weights after; of half of the block
    largest = 4 * ((2 * 2 + 3) * 11008**2 + 3 * 11008 * 4096 + loop)
    assert solving_bytes([block] * 32, sweep, lanes=1) == 2 * 404_766_720 + largest
    two = 4 * ((2 * 2 + 3 * 2) * 11008**2 + 3 * 11008 * 4096 + loop)
    assert solving_bytes([block] * 32, sweep, lanes=2) == 2 * 404_766_720 + two
    for blocks, lanes in ((4, 1), (2, 2), (1, 4)):  # as many as fit in half of the free memory
        least = 2 * blocks * solving_bytes([block] * 32, sweep, lanes=lanes)
        assert blocks_at_once([block] * 32, sweep, threads=4, free_bytes=least) == blocks
    assert blocks_at_once([block] * 32, sweep, threads=4, free_bytes=0) == 1


def test_publishing_without_validation_text_is_refused(place: Place) -> None:
    place.write_plan(publish={"domain": "legal", "guard": {"general": 0.05}})
    assert check(place)["problems"] == [], "what is not ingested yet is not known"
    place.write_plan(
        corpora={"general": {"path": "general", "split": "test"}, "legal": {}},
        compress=[{"method": "sparsegpt", "sparsity": 0.5, "mixture": {"legal": 1.0}}],
        publish={"domain": "legal", "guard": {"general": 0.05}},
    )
    file = place.folder / "few.jsonl"
    write_documents(file, seed="few", count=2)
    ingest(Store(place.home), "legal", [str(file)])
    uncalibratable, legal, general = check(place, code=1)["problems"]
    assert uncalibratable.startswith("corpora.legal: a variant is calibrated on this corpus, and it has no validation")
    assert legal.startswith("publish: legal: publishing is decided on validation text, and this corpus has none")
    assert "2 documents, none of them for validation" in legal
    assert "every document is test text" in general
