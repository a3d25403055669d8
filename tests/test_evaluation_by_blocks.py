"""Evaluation block by block: the results are those of the whole model, with the weights of one block in memory. A run
uses it automatically for a model that does not fit, and then refuses tasks, which need the whole model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from crosscal.errors import ModelError
from crosscal.evaluation.likelihood import window_nll
from crosscal.models import ModelSource, VariantWriter, adapter, load_variant
from crosscal.models.by_blocks import read_by_blocks
from crosscal.models.tensor_files import ADAPTER, save_tensors
from crosscal.models.variant_source import open_variant
from crosscal.report.rows import ResultRow, read_rows
from crosscal.stages import evaluate as stage
from crosscal.stages.moments import DENSE, CachedMoments
from crosscal.stages.preflight import block_shapes
from crosscal.store import Store
from crosscal.tasks import evaluating_memory as choice
from tests.helpers.tiny_models import load_plain, save_model, windows
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_text import tiny_llama
from tests.test_models_names import matrices, write

ROUNDOFF_F32 = 1e-5
ROUNDOFF_OF_LOGITS = 1e-7
"""For a float64 model whose logits are converted to float32, in the sum over a window."""
TEXTS = {"long": windows(7), "short": windows(3, seed=1, length=16)}
BLOCKS = 4
PARTS = (adapter.RIGHT_KI, adapter.LEFT_OK)


def whole(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    model = load_variant(folder, dtype=dtype)
    return {name: window_nll(model, each, device="cpu", batch_tokens=64) for name, each in TEXTS.items()}


def by_blocks(folder: Path, dtype: torch.dtype, spill_to: Path | None = None) -> dict[str, Tensor]:
    sizes = {"device": "cpu", "batch_tokens": 64}
    with read_by_blocks(open_variant(folder), TEXTS, dtype=dtype, spill_to=spill_to, **sizes) as model:
        return {name: window_nll(model, each, **sizes) for name, each in TEXTS.items()}


def pruned(source: ModelSource, folder: Path) -> None:
    """Write a variant whose matrices have their negative weights set to zero."""
    writer = VariantWriter(folder, source)
    for block in range(source.blocks):
        parameters = source.load_block(block)
        solved = {matrix.parameter for number, matrix in matrices(source) if number == block}
        writer.write_block(block, {name: each * (each > 0) for name, each in parameters.items() if name in solved})
    writer.finish()


def packed(source: ModelSource, folder: Path) -> None:
    write(source, folder, is_packed=True)


def with_adapter(source: ModelSource, folder: Path, blocks: int = 2) -> None:
    """Write a variant with low-rank parts, as large as the matrices, in the first blocks."""
    writer, chance = VariantWriter(folder, source), torch.Generator().manual_seed(0)
    for block in range(source.blocks):
        factors: dict[str, Tensor] = {}
        for number, matrix in matrices(source):
            if number == block < blocks:
                outputs, inputs = matrix.weight_OI(source.load_block(block)).shape
                sizes = (outputs, 2), (2, inputs)
                factors |= adapter.factors(matrix, *(0.3 * torch.randn(size, generator=chance) for size in sizes))
        writer.write_block(block, factors)
    writer.finish()


MADE: dict[str, Callable[[ModelSource, Path], None]] = {"pruned": pruned, "packed": packed, "adapter": with_adapter}


@pytest.mark.parametrize(
    ("family", "made"),
    [
        ("llama", "pruned"), ("gpt2", "adapter"),
        ("llama-tied", "adapter"), ("mixtral", "pruned"), ("qwen3-moe", "packed"),
    ],
)  # fmt: skip
def test_every_window_has_the_likelihood_that_the_whole_model_gives_it(family: str, made: str, tmp_path: Path) -> None:
    """For the dense model and for a variant that differs from it, both stored in bfloat16 like most models."""
    dense, variant = save_model(family, tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "variant"
    MADE[made](ModelSource.open(dense), variant)
    found = {folder: by_blocks(folder, torch.float32) for folder in (dense, variant)}
    for folder in (dense, variant):
        for name, nll_S in whole(folder, torch.float32).items():
            torch.testing.assert_close(found[folder][name], nll_S, rtol=ROUNDOFF_F32, atol=0)
    assert all(((found[dense][name] / found[variant][name] - 1).abs() > 1e-3).all() for name in TEXTS)


def test_only_roundoff_is_between_the_two_ways_and_none_comes_from_the_disk(tmp_path: Path) -> None:
    folder, spill = save_model("mixtral", tmp_path / "model"), tmp_path / "spilled"
    double, model = by_blocks(folder, torch.float64), load_plain(folder)
    held, spilled = by_blocks(folder, torch.float32), by_blocks(folder, torch.float32, spill)
    for name in TEXTS:
        expected = window_nll(model, TEXTS[name], device="cpu", batch_tokens=64)
        torch.testing.assert_close(double[name], expected, rtol=ROUNDOFF_OF_LOGITS, atol=0)
        assert torch.equal(held[name], spilled[name])
    assert list(spill.iterdir()) == []


def test_other_tokens_than_those_read_are_refused(tmp_path: Path) -> None:
    source, sizes = open_variant(save_model("llama", tmp_path / "model")), {"device": "cpu", "dtype": torch.float32}
    with read_by_blocks(source, TEXTS, batch_tokens=64, **sizes) as model:
        model(input_ids=TEXTS["long"][2:4, :5])
        with pytest.raises(ModelError, match="not a prefix of any prepared window"):
            model(input_ids=TEXTS["long"][:1, 1:5])


def test_what_cannot_be_read_by_blocks_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "dense"))
    packed(source, tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="can only be loaded whole"):
        open_variant(tmp_path / "packed")
    with_adapter(source, tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER / adapter.WEIGHTS
    save_tensors({f"{adapter.PREFIX}lm_head{part}": torch.ones(1, 1) for part in PARTS}, file)
    with pytest.raises(ModelError, match="low-rank parts outside the blocks"):
        open_variant(tmp_path / "adapter")
    for shard in (tmp_path / "adapter").glob("block-00001*"):
        shard.unlink()
    with pytest.raises(ModelError, match="missing"):
        open_variant(tmp_path / "adapter")
    with pytest.raises(ModelError, match="not a complete model"):
        open_variant(tmp_path)


def test_the_weights_of_two_blocks_are_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from weights outside the blocks; weights count as long as their storage is alive."""
    tiny_llama(tmp_path / "model", blocks=BLOCKS)
    plain, loaded, alive = ModelSource.load_block, list[tuple[StorageWeakRef, int]](), list[int]()

    def count() -> int:
        return sum(numel for storage, numel in loaded if not storage.expired())

    def load_block(source: ModelSource, *given: Any, **more: Any) -> dict[str, Tensor]:
        found = plain(source, *given, **more)
        loaded.extend((StorageWeakRef(each.untyped_storage()), each.numel()) for each in found.values())
        alive.append(count())
        return found

    monkeypatch.setattr(ModelSource, "load_block", load_block)
    by_blocks(tmp_path / "model", torch.float32)
    block = sum(each.numel() for each in plain(ModelSource.open(tmp_path / "model"), 0).values())
    assert len(alive) == 1 + BLOCKS, "the first is also run to see what blocks return"
    assert set(alive) == {block}
    assert count() == 0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    tiny_llama(tmp_path / "model", blocks=BLOCKS)
    place.write_plan(corpora={"general": "general"}, compress=[{"method": "magnitude", "sparsity": 0.5}])
    return place


def leave_too_little(place: Place, monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit the memory to that of evaluation block by block, less than for the whole model; return its bytes."""
    from crosscal.plan import load_plan

    source = ModelSource.open(place.folder / "model")
    shapes = block_shapes(source, CachedMoments(Store(place.home), source.digest, DENSE, "float32"))
    needed = choice.evaluating_memory(load_plan(place.plan), source, shapes)
    assert needed.by_blocks_bytes < needed.whole_bytes
    monkeypatch.setattr(choice, "usable_bytes", lambda device: needed.by_blocks_bytes)
    return needed.by_blocks_bytes


def check(place: Place, code: int) -> dict:
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    assert done.code == code, done.err
    return json.loads(done.out)


def test_a_run_without_room_for_the_model_gives_the_rows_of_one_that_has_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run()
    expected = read_rows(place.run_dir / "results.jsonl", ResultRow)
    other = Place(place.folder / "other")
    other.folder.mkdir()
    for name in ("model", "general", "plan.yaml"):
        (other.folder / name).symlink_to(place.folder / name)
    least = leave_too_little(other, monkeypatch)
    memory = check(other, 0)["memory"]
    assert (memory["evaluating"], memory["evaluating_bytes"]) == ("block by block", least)
    monkeypatch.setattr(stage, "load_variant", lambda *_, **__: pytest.fail("the whole model was loaded"))
    done = crosscal("run", str(other.plan), "--home", str(other.home), "--out", str(other.run_dir))
    assert done.code == 0, done.err
    assert done.err.count("with the weights of one block at a time") == len(["dense", "magnitude-50"]), done.err
    found = read_rows(other.run_dir / "results.jsonl", ResultRow)
    assert len(found) == len(expected) == 4
    for row, due in zip(found, expected, strict=True):
        same = dataclasses.replace(row, value=due.value, stderr=due.stderr, seconds=due.seconds)
        assert same == due
        assert (row.value, row.stderr) == pytest.approx((due.value, due.stderr), rel=ROUNDOFF_F32)
        assert row.seconds > 0


def test_tasks_are_refused_before_anything_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    question = {"question": "Which?", "choices": ["this", "that"], "answer": 0}
    (place.folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    place.write_plan(evaluate={"windows": 4, "tasks": ["questions.jsonl"]})
    assert check(place, 0)["memory"]["evaluating"] == "whole models"
    leave_too_little(place, monkeypatch)
    [problem] = check(place, 1)["problems"]
    assert "evaluate.tasks: a model that does not fit in memory is measured block by block" in problem
    options = ("--home", str(place.home))
    for arguments in (
        ("run", str(place.plan), "--out", str(place.run_dir), *options),
        ("evaluate", str(place.folder / "model"), "--plan", str(place.plan), *options),
    ):
        done = crosscal(*arguments)
        assert done.code in (1, 2), done.err
        assert "on texts, not by tasks" in done.err
    assert not list(place.home.rglob("*.arrow")), "no text was taken in"
