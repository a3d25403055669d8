"""What a run reports about models that are not packed or cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crosscal.report.rows import LayerRow, ResultRow, read_rows
from crosscal.stages.solve import IN_PARTS
from tests.helpers import tiny_models, tiny_packed
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_text import tiny_tokenizer
from tests.test_models_encoded import encode_fp8

RECIPES = [{"method": "gptq", "bits": 4, "group_size": None}, {"method": "magnitude", "sparsity": 0.5}]
PACKED, PRUNED = "gptq-w4-general", "magnitude-50"


def place_of(folder: Path, family: str = "llama", **settings: Any) -> Place:
    place = make_place(folder)
    config = (tiny_models.configs() | tiny_packed.configs())[family]
    config.update({"vocab_size": 400, **settings})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    place.write_plan(compress=RECIPES)
    return place


@pytest.mark.parametrize("family", ["qwen3-moe", "nanochat", "gpt2"])
def test_what_stays_dense_and_the_size_are_told(family: str, tmp_path: Path) -> None:
    """`plan check` reports it before, the run afterwards; shares and sizes match those of the files."""
    place = place_of(tmp_path, family)
    told = json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)["stored"]
    record = place.run()
    model = place.run_dir / "models" / PACKED
    rows = [row for row in read_rows(place.run_dir / "layers.jsonl", LayerRow) if row.variant == PACKED]
    shapes = [
        tensor.tolist()
        for file in model.glob("block-*.safetensors")
        for key, tensor in load_file(file).items()
        if key.endswith("weight_shape")
    ]
    packed, total = sum(rows * columns for rows, columns in shapes), sum(row.parameters or 0 for row in rows)
    assert packed == sum(row.parameters or 0 for row in rows if row.bits and row.written_dense is None)
    [note] = [note for note in record["notes"] if note.startswith(PACKED)]
    assert f"{100 * (1 - packed / total):.3g} % of the block weights stay in bfloat16" in note
    assert [each["variants"] for each in told] == [[PACKED]]
    assert told[0]["dense"] == note.partition(": ")[2]
    stored_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in model.glob("*.safetensors"))
    assert told[0]["bytes"] == pytest.approx(stored_bytes - headers, rel=0.01)
    assert f"{stored_bytes / 1e6:,.1f} MB on disk" in note


def test_a_variant_that_cannot_be_loaded_fails_alone(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    first = place.run()
    assert first["failed"] == {}
    model = place.run_dir / "models" / PACKED
    shard = model / "block-00001.safetensors"
    tensors = load_file(shard)
    save_file({key: value for key, value in tensors.items() if "q_proj" not in key}, shard)
    before = read_rows(place.run_dir / "results.jsonl", ResultRow)
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    assert PACKED in done.err
    assert "%|" not in done.err  # no progress bars of the libraries that load it
    after = read_rows(place.run_dir / "results.jsonl", ResultRow)
    numbers = [
        {(row.variant, row.corpus_or_task): row.value for row in rows if row.variant != PACKED}
        for rows in (before, after)
    ]
    assert numbers[0] == numbers[1]
    lost = [row for row in after if row.variant == PACKED]
    assert {row.corpus_or_task for row in lost} == {"general", "legal"}
    assert all(row.value is None and "q_proj" in (row.skipped or "") for row in lost)
    assert not (model / "model.safetensors.index.json").exists()  # not a complete model
    assert (place.run_dir / "models" / PRUNED / "model.safetensors.index.json").exists()
    assert (place.run_dir / "report.html").read_text().count("q_proj") > 0
    assert any(
        note.startswith(PACKED) and "could not be written" in note for note in json.loads(_record(place))["notes"]
    )


def test_a_stack_with_a_starved_expert_stays_dense_and_loads(tmp_path: Path) -> None:
    """transformers treats all experts of a stack as packed, or none; the other matrices are packed as usual."""
    place = place_of(tmp_path, "qwen3-moe", num_experts_per_tok=1)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    router = "model.layers.0.mlp.gate.weight"
    tensors[router][3] = tensors[router][:3].mean(0)  # never the highest score of the four
    save_file(tensors, file, metadata={"format": "pt"})
    place.write_plan(compress=[RECIPES[0] | {"fallback": "keep-dense"}])
    assert place.run()["failed"] == {}
    rows = read_rows(place.run_dir / "layers.jsonl", LayerRow)
    stack = [row for row in rows if row.layer.startswith("model.layers.0.mlp.experts")]
    starved = [row for row in stack if ".3." in row.layer]
    assert all(row.fallback for row in starved)
    assert all(row.bits == 4 and row.written_dense == IN_PARTS for row in stack if row not in starved)
    others = [row for row in rows if row not in stack and row.fallback is None]
    assert others
    assert all(row.bits == 4 and row.written_dense is None for row in others)


def test_a_run_says_that_it_decodes(tmp_path: Path) -> None:
    """It measures the decoded model: the numbers equal those of the same values stored in bfloat16."""
    place = place_of(tmp_path)
    plain = {name: tmp_path / name for name in ("model", "meant")}
    shutil.copytree(plain["model"], plain["meant"])
    save_file(encode_fp8(plain["model"]), plain["meant"] / "model.safetensors", metadata={"format": "pt"})
    told = json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)
    assert told["problems"] == []
    record = place.run()
    [note] = [note for note in record["notes"] if "fp8" in note]
    assert told["model"]["notes"] == [note]
    assert "bfloat16" in note
    place.write_plan(compress=RECIPES, model="meant")
    crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(tmp_path / "other"))
    rows = [read_rows(folder / "results.jsonl", ResultRow) for folder in (place.run_dir, tmp_path / "other")]
    numbers = [{(row.variant, row.corpus_or_task): row.value for row in each} for each in rows]
    assert numbers[0] == numbers[1]


def _record(place: Place) -> str:
    return (place.run_dir / "run.json").read_text()
