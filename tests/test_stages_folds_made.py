"""Norms that absorb scales, in models made in sequence, resumed, from parts or by a plan: the same files and losses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosscal.errors import PlanError
from crosscal.models.loading import load_variant
from crosscal.plan import CompressionPlan
from crosscal.progress import silent
from crosscal.report.rows import LayerRow, ResultRow, read_rows
from crosscal.stages.compress import compress_sequential, layer_rows, publish_variant
from crosscal.stages.made_variants import note_made, take_blocks
from crosscal.stages.solved_blocks import collect_block, publish_block
from crosscal.store import digest_file
from crosscal.variants import KEEP_DENSE, Variant, variants
from tests.helpers.folded_variants import AWQ, EVERY, PRUNED, ROUNDED, context_of, make, recipe, sites_of
from tests.helpers.tiny_models import load_plain, windows
from tests.helpers.tiny_place import crosscal, make_place

pytestmark = pytest.mark.usefixtures("quick_disk")
ROUNDOFF_F32 = 1e-4


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("each", [ROUNDED, PRUNED], ids=lambda each: each.name)
@torch.no_grad()
def test_sequential_inputs_come_through_the_folded_blocks(each: Variant, tmp_path: Path) -> None:
    """A later block's moments are those of the model as written, before that block's own norm is divided. A killed run
    resumes to the same model."""
    context = context_of(tmp_path, "llama")
    each = dataclasses.replace(each, upstream="sequential")
    compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)
    made = context.folder / "models" / each.name
    model, dense = load_variant(made, dtype=torch.float64), load_plain(context.source.path)
    entering: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(windows(40, seed=1)[:-2], use_cache=False)
    input_TI = dense.model.layers[1].input_layernorm(entering[0]).flatten(0, 1)
    energies = {  # tr(W H Wᵀ) of the dense matrix on these inputs
        row.layer: float((input_TI @ dense.get_parameter(f"{row.layer}.weight").double().mT).square().sum())
        for row in layer_rows(context, [each])
        if row.site == "self_attn.q_proj" and row.block == 1
    }
    for row in layer_rows(context, [each]):
        if row.layer in energies:
            assert row.fold == "input_layernorm"
            assert row.loss / row.relative_loss == pytest.approx(energies[row.layer] / len(input_TI), rel=ROUNDOFF_F32)
    before = contents(made)
    for late in (1, 2):
        (made / f"block-{late:05d}.safetensors").unlink()
    (made / "model.safetensors.index.json").unlink()
    shutil.rmtree(tmp_path / "home")
    again = context_of(tmp_path, "llama")
    compress_sequential(again, each, batch_tokens=64, report=silent)
    publish_variant(again, each)
    assert contents(made) == before


def test_blocks_of_other_machines_and_runs_are_the_same(tmp_path: Path) -> None:
    context = context_of(tmp_path, "gemma2")
    make(context, EVERY)
    expected = contents(context.folder / "models")
    away = dataclasses.replace(context, folder=tmp_path / "away")
    for block in range(context.source.blocks):
        publish_block(context, block, EVERY)
        assert collect_block(away, block, EVERY) == len(EVERY)
    for each in EVERY:
        publish_variant(away, each)
    assert contents(away.folder / "models") == expected
    folded = [row.fold for row in layer_rows(context, EVERY)]
    assert folded == [row.fold for row in layer_rows(away, EVERY)]
    later = dataclasses.replace(context, folder=tmp_path / "later")
    for each in EVERY:
        made = context.folder / "models" / each.name
        files = {name: digest for name, digest in contents(made).items() if name.endswith(".safetensors")}
        note_made(context, each, files, layer_rows(context, [each]))
    assert take_blocks(later, EVERY, silent) == len(EVERY) * context.source.blocks
    for each in EVERY:
        publish_variant(later, each)
    assert contents(later.folder / "models") == expected


def test_a_site_that_stays_dense_divides_no_norm(tmp_path: Path) -> None:
    """With few tokens H is singular: without damping, solves fail and the plan's fallback keeps these sites dense."""
    context = context_of(tmp_path, "llama", count=3)
    each = recipe("kept", AWQ, ("sparsegpt", {"sparsity": 0.5, "damping": 0.0}), fallback=KEEP_DENSE)
    make(context, [each])
    rows = layer_rows(context, [each])
    kept = {row.layer for row in rows if row.fallback}
    assert kept
    assert {row.fold for row in rows if row.fallback} == {None}
    dense, made = (load_plain(path).state_dict() for path in (context.source.path, context.folder / "models" / "kept"))
    for block, site in ((block, site) for block, site in sites_of(context) if site.producer):
        prefix = f"{context.source.block_name(block)}."
        assert site.producer
        for name in [*site.producer.parameters, *(matrix.parameter for matrix in site.matrices)]:
            assert torch.equal(dense[prefix + name], made[prefix + name]) == (prefix + site.name in kept)


def test_a_plan_with_awq_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    scales, at = {"method": "awq", "bits": 3, "group_size": 32}, {"domain": "legal", "alpha": 0.5}
    rounding = [{"method": name, "bits": 4, "group_size": 32} for name in ("rtn", "gptq")]
    place.write_plan(compress=[{**at, "steps": [scales, last]} for last in rounding] + [{**at, **scales}])
    run = Path(place.run()["run_dir"])
    rows = {row.variant: row for row in read_rows(run / "results.jsonl", ResultRow) if row.corpus_or_task == "legal"}
    names = [
        "awq-bits3-groupsize32-rtn-w4g32-legal-a0.5",
        "awq-bits3-groupsize32-gptq-w4g32-legal-a0.5",
        "awq-bits3-groupsize32-legal-a0.5",
    ]
    assert list(rows) == ["dense", *names]
    assert [amount["text"] for amount in rows[names[0]].amounts] == ["4 bits g32"]
    assert rows[names[2]].amounts == []
    assert rows[names[2]].value == pytest.approx(rows["dense"].value, rel=1e-4)
    layers = read_rows(run / "layers.jsonl", LayerRow)
    assert {row.fold for row in layers if row.site == "self_attn.q_proj"} == {"input_layernorm"}
    assert {row.fold for row in layers if row.site == "mlp.down_proj"} == {"none: no norm makes its input"}
    assert {row.bits for row in layers if row.variant == names[2]} == {None}


def test_scales_come_before_rounding(tmp_path: Path) -> None:
    entry = {"steps": [{"method": "rtn", "bits": 4}, {"method": "awq", "bits": 4}]}
    plan = CompressionPlan.model_validate({"model": "m", "corpora": {"general": "g"}, "compress": [entry]})
    with pytest.raises(PlanError, match=r"compress\.0: .*rtn \+ awq"):
        variants(plan)
    place = make_place(tmp_path)
    place.write_plan(compress=[entry])
    assert crosscal("plan", "check", str(place.plan), "--home", str(place.home)).code == 2
