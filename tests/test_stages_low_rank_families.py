"""Low-rank parts of other families: named as PEFT names them, and refused for matrices of experts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from crosscal.errors import ModelError
from crosscal.models import ModelSource, VariantWriter, adapter, load_variant
from crosscal.plan import parse_plan
from crosscal.stages.compress import compress_block
from crosscal.store import Store
from crosscal.tasks.refusals import refusals, unnameable
from tests.helpers.low_rank_variants import PEFTS_OWN, RECIPES, recipe
from tests.helpers.tiny_models import save_model
from tests.helpers.tiny_run import collect, run_context, sample, windows
from tests.helpers.tiny_text import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.mark.filterwarnings(PEFTS_OWN)
@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "phi3", "falcon-parallel", "opt", "bloom"])
def test_other_families_are_named_as_peft_names_them(tmp_path: Path, family: str) -> None:
    """Transposed linears, linears with biases, various names, differing ranks, and linears without a low-rank part."""
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    chance = torch.Generator().manual_seed(0)
    writer = VariantWriter(tmp_path / "variant", source)
    for block in range(source.blocks):
        module = source.weights.model.get_submodule(source.block_name(block))
        changed, shapes = {}, {name: shape_OI(part) for name, part in module.named_modules()}
        for name, shape in shapes.items():
            if shape is not None and (block > 0 or "attn" in name or "attention" in name):
                changed[f"{name}.lora_B.weight"] = torch.randn(shape[0], 2 + block, generator=chance)
                changed[f"{name}.lora_A.weight"] = torch.randn(2 + block, shape[1], generator=chance)
        assert changed
        writer.write_block(block, changed)
    writer.finish()
    with torch.no_grad():
        tokens = windows(2, seed=5, high=96)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "variant")
        theirs = PeftModel.from_pretrained(base, tmp_path / "variant" / "adapter").eval()
        loaded = {name for name, _ in theirs.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))}
        ours = load_variant(tmp_path / "variant")
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "variant" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert loaded == {f"base_model.model.{name}.lora_{side}.default" for name in written for side in "AB"}


def shape_OI(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if type(module).__name__ == "Conv1D" else None


def test_experts_are_refused_before_anything_is_solved_and_never_written(tmp_path: Path) -> None:
    source, store = ModelSource.open(save_model("mixtral", tmp_path / "model")), Store(tmp_path / "home")
    stacks = adapter.stacked_experts(source.weights.model)
    assert len(stacks) == source.blocks
    for each in RECIPES:
        assert "cannot name one expert" in str(next(unnameable([each], stacks)))
        assert not list(unnameable([each], []))
    assert not list(unnameable([recipe("none", ("sparsegpt", {"sparsity": 0.5}), ("eora", {"rank": 0}))], stacks))
    context = run_context(
        tmp_path / "run",
        store,
        source,
        *(sample(store, corpus, windows(200, seed=1, high=96)) for corpus in ("general", "legal")),
    )
    for each in context.samples.values():
        collect(context.cached, source, each.sets)
    with pytest.raises(ModelError, match="cannot name one expert"):
        compress_block(context, 0, [RECIPES[0]])
    assert not list((tmp_path / "run" / "models").rglob("*.safetensors"))


def test_a_plan_for_a_model_with_experts_is_refused(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("mixtral", tmp_path / "model"))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    entry = {"steps": [{"method": "wanda", "sparsity": 0.5}, {"method": "eora", "rank": [0, 4]}]}
    plan = parse_plan({"model": "m", "corpora": {"general": "g"}, "compress": [entry]})
    (refusal,) = refusals(plan, source, [])
    assert re.fullmatch(
        r"model\.layers\.0\.mlp\.experts and 2 more: .*\(got wanda-50-eora-rank4-general\)\. .*", str(refusal)
    )
