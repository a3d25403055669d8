"""Layers that cannot be solved: an error that names the layer, or the fallback that the plan names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crosscal.compressors import COMPRESSORS, LayerProblem, Sparsity
from crosscal.errors import NotPositiveDefinite
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.stages.compress import RunContext, compress_block, layer_rows
from crosscal.stages.sample import Sample
from crosscal.stages.solve_site import _relative_loss
from crosscal.store import Store
from tests.helpers.tiny_run import collect, part, run_context, sums, tiny_source, variant, windows
from tests.helpers.tiny_variants import compress_all

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module", params=[torch.float32], ids=str)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"), request.param)


def starved(tmp_path: Path, store: Store, source: ModelSource) -> RunContext:
    """One window of 32 tokens for 64 inputs: without damping the Hessian of `down_proj` is singular."""
    few = (sums(part(store, windows(1, seed))) for seed in (5, 6))
    context = run_context(tmp_path / "run", store, source, Sample("general", 0, *few))
    collect(context.cached, source, context.samples["general", 0].sets)
    return context


def test_what_cannot_be_solved_is_an_error_that_names_the_layer(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    each = variant("undamped", "sparsegpt", {"general": 1.0}, sparsity=0.5, damping=0.0)
    with pytest.raises(NotPositiveDefinite, match=r"model\.layers\.0\.mlp\.down_proj: .*Raise damping"):
        compress_block(starved(tmp_path, store, source), 0, [each])


def test_a_fallback_that_the_plan_names_is_listed_and_nothing_else_changes(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    context = starved(tmp_path, store, source)
    each = variant("undamped", "sparsegpt", {"general": 1.0}, sparsity=0.5, damping=0.0, fallback="keep-dense")
    sound = variant("damped", "sparsegpt", {"general": 1.0}, sparsity=0.5, damping=0.01)
    compress_all(context, [each, sound])
    rows = {row.layer: row for row in layer_rows(context, [each])}
    kept = {name for name, row in rows.items() if row.fallback}
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} <= kept
    assert all(row.fallback is None for row in layer_rows(context, [sound]))
    dense = load_file(source.path / "model.safetensors")
    model = load_variant(context.folder / "models" / "undamped")
    for name, row in rows.items():
        weight = model.get_parameter(f"{name}.weight")
        assert (row.parameters, row.stays_dense) == (weight.numel(), name in kept)
        assert torch.equal(weight, dense[f"{name}.weight"]) == (name in kept)
        if row.fallback:
            assert row.fallback.startswith("keep-dense: ")
            assert "not positive definite" in row.fallback
            assert (row.relative_loss, row.tokens) == (0.0, 0)


def test_a_loss_relative_to_nothing_is_no_loss_of_zero() -> None:
    """If the output energy is zero, the relative loss is None, not 0."""
    layer = LayerProblem(name="silent", weight_OI=torch.ones(4, 4), hessian_II=torch.eye(4))
    solution = COMPRESSORS["magnitude"](Sparsity.parse(0.5)).compress(layer)
    assert _relative_loss(layer, solution, torch.zeros(4, 4), 0.0) is None
    assert _relative_loss(layer, solution, torch.eye(4), 16.0) == 0.5
