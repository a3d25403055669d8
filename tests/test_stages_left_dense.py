"""Every matrix of every block has a row in a run's layers, solved or not."""

from __future__ import annotations

from pathlib import Path

from crosscal.models import ModelSource
from crosscal.models.blocks import find_blocks
from crosscal.models.experts import is_experts
from crosscal.stages.compress import compress_block, layer_rows
from crosscal.stages.preflight import left_dense
from crosscal.store import Store
from tests.helpers.tiny_models import save_model
from tests.helpers.tiny_run import collect, sample, variant, windows, workshop


def test_what_stays_dense_is_a_row_with_the_reason(tmp_path: Path) -> None:
    source, store = ModelSource.open(save_model("qwen2-moe", tmp_path / "model")), Store(tmp_path / "home")
    shop = workshop(tmp_path / "run", store, source, sample(store, "general", windows(200, seed=1, high=96)))
    variants = [
        variant("half", "wanda", {"general": 1.0}, sparsity=0.5),
        variant("small", "magnitude", None, sparsity=0.3),
    ]
    foretold = left_dense(source, shop.cached)
    for each in shop.samples.values():
        collect(shop.cached, source, each.sets)
    for block in range(source.blocks):
        compress_block(shop, block, variants)
    assert left_dense(source, shop.cached) == foretold  # of what was calibrated nothing is read
    assert foretold == [
        "mlp.gate: a router: it only chooses what others read (3 blocks)",
        "mlp.shared_expert_gate: a gate of one output (3 blocks)",
    ]
    rows = layer_rows(shop, variants)
    for each in variants:
        mine = {row.layer: row for row in rows if row.variant == each.name}
        assert mine.keys() == set(matrices(source))
        left = {name: row.fallback for name, row in mine.items() if row.fallback}
        assert left == {
            f"model.layers.{block}.mlp.{name}": f"left dense: {reason}"
            for block in range(3)
            for name, reason in (
                ("gate", "a router: it only chooses what others read"),
                ("shared_expert_gate", "a gate of one output"),
            )
        }
        assert all(mine[name].sparsity == 0 and mine[name].bits is None for name in left)


def matrices(source: ModelSource) -> list[str]:
    """Names of all matrices of all blocks, by their shapes alone."""
    found = []
    for index, block in enumerate(find_blocks(source.weights.model)[1]):
        for name, module in block.named_modules():
            for parameter, tensor in module.named_parameters(recurse=False):
                experts = range(tensor.shape[0]) if is_experts(module) else [None]
                parts = [name if expert is None else f"{name}.{expert}.{parameter}" for expert in experts]
                found += [f"{source.block_name(index)}.{part}" for part in parts if tensor.ndim > 1]
    return found
