"""The files that a run writes, the tokens it reads, and what a second run reuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from crosscal.models import ModelSource
from crosscal.store import Store
from tests.helpers.moment_sums import difference_from_one_reading
from tests.helpers.tiny_place import Place, crosscal, make_place, values, write_documents

RESULT_FIELDS = {
    *("variant", "method", "setting", "upstream", "mixture", "corpus_or_task", "split", "metric", "value", "stderr"),
    *("tokens", "seed", "model", "device", "seconds"),
}
LAYER_FIELDS = {
    *("variant", "layer", "method", "setting", "loss", "heldout_relative_loss", "damping", "dead_inputs"),
    *("tokens", "seconds", "fallback"),
}
STAGES = ["ingest", "sample", "moments", "solve", "evaluate", "report"]
SET_TOKENS = (8 + 4) * 32
"""Calibration and held-out tokens of one corpus in one draw."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_every_file_of_the_contract(place: Place) -> None:
    questions = place.folder / "facts.jsonl"
    questions.write_text('{"question": "A river runs to the", "choices": ["sea", "moon"], "answer": 0}\n' * 4)
    place.write_plan(
        compress=[
            {"method": "sparsegpt", "sparsity": "2:4", "domain": "legal", "alpha": [0, 0.5]},
            {"method": "gptq", "bits": 4, "group_size": 32},
            {"method": "magnitude", "sparsity": 0.5},
        ],
        evaluate={"windows": 4, "tasks": ["facts.jsonl"]},
    )
    record, run = place.run(), place.run_dir
    names = ["sparsegpt-2of4-general", "sparsegpt-2of4-legal-a0.5", "gptq-w4g32-general", "magnitude-50"]

    results = rows(run / "results.jsonl")
    assert all(row.keys() >= RESULT_FIELDS for row in results)
    assert list(dict.fromkeys(row["variant"] for row in results)) == ["dense", *names]
    assert {row["corpus_or_task"] for row in results if row["variant"] == "dense"} == {"general", "legal", "facts"}
    of_text = [row for row in results if row["metric"] == "perplexity"]
    perplexities = {(row["variant"], row["corpus_or_task"], row["split"]): row for row in of_text}
    windows = {(row["variant"], row["corpus"], row["split"]): row["nll"] for row in rows(run / "windows.jsonl")}
    assert {split for *_, split in windows} == {"test", "validation"}
    assert windows.keys() == perplexities.keys()
    for where, nll in windows.items():
        assert math.exp(sum(nll) / len(nll)) == pytest.approx(perplexities[where]["value"], rel=1e-5)
    accuracies = {(row["variant"], row["metric"]): row["value"] for row in results if row["corpus_or_task"] == "facts"}
    asked = {(row["variant"], row["metric"]): row["correct"] for row in rows(run / "questions.jsonl")}
    assert {where: sum(correct) / 4 for where, correct in asked.items()} == accuracies
    layers = rows(run / "layers.jsonl")
    assert all(row.keys() >= LAYER_FIELDS for row in layers)
    assert all(row["parameters"] > 0 for row in layers)
    assert len(layers) == len(names) * 2 * 7

    written = json.loads((run / "run.json").read_text())
    assert list(written["stages"]) == STAGES
    assert written["cache"] == {"hits": 0, "misses": 2 * 2 * 2 * 4}  # sets of a corpus, corpora, blocks, sites
    assert written["calibration_tokens_read"] == record["calibration_tokens_read"] == 2 * SET_TOKENS
    assert written["peak_rss_bytes"] > 2**26
    assert {"device", "commit", "corpora", "notes"} <= written.keys()
    assert {"torch", "transformers", "crosscal", "python"} <= written["versions"].keys()

    assert yaml.safe_load((run / "plan.yaml").read_text())["calibration"]["batch_tokens"] == 4096
    assert "<html" in (run / "report.html").read_text()
    samples = json.loads((run / "samples.json").read_text())
    assert {(sample["corpus"], sample["source"]) for sample in samples} == {
        ("general", "documents"),
        ("legal", "documents"),
    }

    tokens_BL = torch.arange(3, 35)[None]
    dense = AutoModelForCausalLM.from_pretrained(place.folder / "model", dtype="auto")
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(run / "models" / name, dtype="auto").eval()
        assert not torch.allclose(model(tokens_BL).logits, dense(tokens_BL).logits)
        if "2of4" in name:
            weight = model.model.layers[1].mlp.down_proj.weight
            assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2


def test_the_plan_a_run_wrote_is_that_run(place: Place) -> None:
    place.run()
    again = crosscal("run", str(place.run_dir / "plan.yaml"), "--home", str(place.home), "--out", str(place.run_dir))
    assert again.code == 0, again.err
    assert "no forward pass for calibration" in again.out


def test_a_second_run_reads_nothing_and_says_so(place: Place) -> None:
    place.run()
    before = values(place.run_dir / "results.jsonl")
    again = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert "no forward pass for calibration" in again.out
    record = json.loads((place.run_dir / "run.json").read_text())
    assert record["calibration_tokens_read"] == 0
    assert record["cache"] == {"hits": 32, "misses": 0}
    assert values(place.run_dir / "results.jsonl") == before


def test_a_landed_document_costs_only_its_own_tokens(place: Place) -> None:
    first = place.run()
    write_documents(place.folder / "legal" / "train-2.jsonl", seed="new", count=30)
    write_documents(place.folder / "legal" / "validation-2.jsonl", seed="new-validation", count=10)
    second = place.run("--out", str(place.folder / "run2"))
    assert second["corpora"]["legal"]["version"] == first["corpora"]["legal"]["version"] + 1
    assert second["corpora"]["legal"]["added"] == 40
    assert second["corpora"]["general"]["version"] == first["corpora"]["general"]["version"]
    assert 0 < second["calibration_tokens_read"] <= SET_TOKENS / 2  # a third of the corpus, so a third of its windows
    assert second["cache"]["hits"] == 32
    source = ModelSource.open(place.folder / "model")
    run_dir, anew = place.folder / "run2", place.folder / "home2"
    assert difference_from_one_reading(run_dir, str(place.home), "legal", source, anew) <= 1e-6
    assert difference_from_one_reading(run_dir, str(place.home), "general", source, anew) == 0


def test_one_new_document_in_a_hundred_costs_a_fiftieth_at_most(place: Place) -> None:
    (place.folder / "legal" / "train.jsonl").unlink()
    write_documents(place.folder / "legal" / "train.jsonl", seed="more", count=300)
    place.write_plan(calibration={"windows": 100, "length": 32, "held_out_windows": 20})
    first = place.run()
    write_documents(place.folder / "legal" / "train-2.jsonl", seed="new", count=3)
    write_documents(place.folder / "legal" / "validation-2.jsonl", seed="new-validation", count=1)
    second = place.run("--out", str(place.folder / "run2"))
    assert 0 < second["calibration_tokens_read"] <= 0.02 * first["calibration_tokens_read"]
    source = ModelSource.open(place.folder / "model")
    home, anew = str(place.home), place.folder / "home2"
    assert difference_from_one_reading(place.folder / "run2", home, "legal", source, anew) <= 1e-6


@pytest.mark.slow
def test_a_sweep_reads_each_corpus_once(place: Place) -> None:
    sparsities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    entry = {"method": "sparsegpt", "sparsity": sparsities, "domain": "legal", "alpha": [0.5, 1]}
    place.write_plan(compress=[entry], execution={"device": "cpu", "keep_models": False})
    record = place.run()
    assert record["variants"] == 16
    assert record["calibration_tokens_read"] == 2 * SET_TOKENS
    assert not list((place.run_dir / "models").iterdir())

    # Only the numbers were kept: a second run finds them without a calibration pass.
    before = values(place.run_dir / "results.jsonl")
    assert place.run()["calibration_tokens_read"] == 0
    assert values(place.run_dir / "results.jsonl") == before


def test_seeds_draw_anew_and_are_told_apart(place: Place) -> None:
    place.write_plan(calibration={"windows": 8, "length": 32, "held_out_windows": 4, "seed": [0, 1]})
    record = place.run()
    assert record["calibration_tokens_read"] == 4 * SET_TOKENS
    losses = {row["variant"]: row["loss"] for row in rows(place.run_dir / "layers.jsonl")}
    assert losses["sparsegpt-50-general-s0"] != losses["sparsegpt-50-general-s1"]


def test_sequential_variants_are_kept_too(place: Place) -> None:
    entry = {"method": "sparsegpt", "sparsity": 0.5, "upstream": ["dense", "sequential"]}
    place.write_plan(compress=[entry])
    assert place.run()["calibration_tokens_read"] == 2 * SET_TOKENS
    other = place.run("--out", str(place.folder / "run2"))
    assert other["calibration_tokens_read"] == 0
    assert values(place.folder / "run2" / "results.jsonl") == values(place.run_dir / "results.jsonl")
    layers = {(row["variant"], row["layer"]): row["loss"] for row in rows(place.run_dir / "layers.jsonl")}
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    dense, sequential = "sparsegpt-50-general", "sparsegpt-50-general-sequential"
    assert layers[dense, first] == layers[sequential, first]
    assert layers[dense, last] != layers[sequential, last]


def test_a_plan_without_compression_measures_the_dense_model(place: Place) -> None:
    place.write_plan(compress=[])
    assert place.run()["calibration_tokens_read"] == 0
    assert {row["variant"] for row in rows(place.run_dir / "results.jsonl")} == {"dense"}


def test_what_was_not_taken_is_told(place: Place) -> None:
    file = place.folder / "legal" / "train-2.jsonl"
    file.write_bytes(
        b'{"text": "short"}\n{"text": "\xff\xfe not in UTF-8, and long enough to count"}\nno JSON at all\n'
    )
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 0, done.err
    note = next(line for line in done.out.splitlines() if "legal: 3 documents rejected" in line)
    assert note in [f"note: {text}" for text in json.loads((place.run_dir / "run.json").read_text())["notes"]]
    rejects = next(word for word in note.split() if word.startswith("objects/rejects/")).rstrip(".")
    assert len((place.home / rejects).read_text().splitlines()) == 3
    assert all(problem is None for _, _, problem in Store(place.home).verify())


def test_evaluate_gives_the_rows_of_the_run(place: Place) -> None:
    place.run()
    common = ("--plan", str(place.plan), "--home", str(place.home), "--json")
    for variant in ("dense", "sparsegpt-50-legal-a0.5"):
        model = place.folder / "model" if variant == "dense" else place.run_dir / "models" / variant
        done = crosscal("evaluate", str(model), *common)
        assert done.code == 0, done.err
        expected = [row for row in rows(place.run_dir / "results.jsonl") if row["variant"] == variant]
        assert json.loads(done.out) == expected
    copy = place.folder / "mine"
    (place.run_dir / "models" / "sparsegpt-50-general").rename(copy)
    found = json.loads(crosscal("evaluate", str(copy), *common).out)
    assert {(row["variant"], row["method"]) for row in found} == {("mine", "given")}
