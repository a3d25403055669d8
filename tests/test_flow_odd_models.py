"""Valid but unusual models: an odd matrix, zeros, float64, one name for two tied tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from crosscal.models import ModelSource, load_variant
from crosscal.report.rows import LayerRow, ResultRow, read_rows
from tests.helpers.tiny_models import save_model, windows
from tests.helpers.tiny_place import Place, crosscal
from tests.test_flow_packed import place_of
from tests.test_models_names import matrices, stored, write

GPTQ = {"method": "gptq", "bits": 4}


def edit(place: Place, change: Any) -> None:
    file = place.folder / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def check(place: Place) -> dict[str, Any]:
    return json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)


def test_a_group_size_that_fits_all_but_one_matrix_leaves_that_one_dense(tmp_path: Path) -> None:
    """All matrices have 32 inputs, except down_proj with 48."""
    place = place_of(tmp_path)
    place.write_plan(compress=[GPTQ | {"group_size": 32}])
    told = check(place)
    assert told["problems"] == []
    why = "left dense: group_size 32 does not divide its 48 inputs"
    assert why in told["stored"][0]["dense"]
    record = place.run()
    assert any(why in note for note in record["notes"])
    rows = read_rows(place.run_dir / "layers.jsonl", LayerRow)
    assert {row.fallback for row in rows if "down_proj" in row.layer} == {why}
    assert {row.fallback for row in rows if "down_proj" not in row.layer} == {None}
    packed = [key for key in stored(place.run_dir / "models" / "gptq-w4g32-general") if "packed" in key]
    assert len(packed) == sum(row.bits == 4 for row in rows) > 0


def test_a_group_size_that_fits_few_matrices_is_refused(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    place.write_plan(compress=[GPTQ | {"group_size": 48}])
    assert any("group_size must divide" in problem for problem in check(place)["problems"])


def test_a_matrix_of_zeros_is_not_the_windows_fault(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    zero = "model.layers.1.mlp.up_proj"
    edit(place, lambda tensors: tensors | {f"{zero}.weight": torch.zeros_like(tensors[f"{zero}.weight"])})
    place.write_plan(compress=[GPTQ | {"group_size": None}])
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    assert "mlp.up_proj" in done.err
    assert "windows" not in done.err
    place.write_plan(compress=[GPTQ | {"group_size": None, "fallback": "keep-dense"}])
    crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(tmp_path / "kept"))
    rows = read_rows(tmp_path / "kept" / "layers.jsonl", LayerRow)
    assert [row.layer for row in rows if row.fallback] == ["model.layers.1.mlp.down_proj"]


def test_float64_is_read_as_the_same_numbers(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    place.write_plan(compress=[GPTQ | {"group_size": 16}, {"method": "sparsegpt", "sparsity": 0.5}])
    found: list[dict[tuple[str, str], float | None]] = []
    for dtype in (torch.float32, torch.float64):
        edit(place, lambda tensors, dtype=dtype: {key: tensor.to(dtype) for key, tensor in tensors.items()})
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(
            json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")})
        )
        out = tmp_path / str(dtype)
        assert crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(out)).code == 0
        rows = read_rows(out / "results.jsonl", ResultRow)
        found.append({(row.variant, row.corpus_or_task): row.value for row in rows})
    assert found[0].keys() == found[1].keys()
    assert all(found[0][key] == pytest.approx(found[1][key], rel=1e-6) for key in found[0])


def test_tied_weights_may_stand_under_either_name(tmp_path: Path) -> None:
    folder = save_model("llama-tied", tmp_path / "model")
    expected, logits = sums(folder), plain_logits(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(plain_logits(folder), logits)  # transformers loads it
    assert sums(folder) == expected
    source = ModelSource.open(folder)
    write(source, tmp_path / "variant", is_packed=False)
    assert stored(tmp_path / "variant").keys() == tensors.keys()
    with torch.no_grad():
        ours = load_variant(tmp_path / "variant")(windows(2)).logits
    assert torch.equal(plain_logits(tmp_path / "variant"), ours)


def sums(folder: Path) -> tuple[list[str], float]:
    """Return the names of the matrices found, and the sum of the embedding."""
    source = ModelSource.open(folder)
    outside = source.load_outside()
    return [matrix.name for _, matrix in matrices(source)], float(outside["model.embed_tokens.weight"].double().sum())


def plain_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(windows(2)).logits


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_what_a_checkpoint_lacks_is_told_before_anything_is_read(tmp_path: Path, lost: str) -> None:
    """`plan check` and the run report it in the same sentence, for a tensor in or after the blocks."""
    place = place_of(tmp_path)
    edit(place, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    place.write_plan(compress=[GPTQ | {"group_size": None}])
    problems = [problem for problem in check(place)["problems"] if "missing from the checkpoint" in problem]
    assert len(problems) == 1
    assert lost in problems[0]
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code != 0
    assert problems[0] in done.err
    assert not [*place.home.glob("objects/moments/*")]


@pytest.mark.parametrize("upstream", ["dense", "sequential"])
def test_an_error_of_a_reading_names_the_corpus(tmp_path: Path, upstream: str) -> None:
    place = place_of(tmp_path)
    place.write_plan(compress=[GPTQ | {"group_size": None, "upstream": upstream}])
    weight = "model.layers.1.mlp.up_proj.weight"
    edit(place, lambda tensors: tensors | {weight: torch.full_like(tensors[weight], torch.inf)})
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    assert "'general'" in done.err
    assert not re.search("[0-9a-f]{12}", done.err)
