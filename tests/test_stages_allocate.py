"""Allocators on a mixture-of-experts model whose experts do not all receive tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from crosscal.errors import EmptyStatistics
from crosscal.models.source import ModelSource
from crosscal.stages.allocate import allocated, summarise_block, unsummarised
from crosscal.stages.compress import RunContext, compress_block, layer_rows
from crosscal.store import Store
from crosscal.variants import RecipeStep, Variant
from tests.helpers.tiny_models import VOCABULARY, save_model
from tests.helpers.tiny_run import collect, run_context, sample, variant

TARGET = 0.5


def with_owl(name: str, **more: str) -> Variant:
    plain = variant(name, "sparsegpt", {"general": 1.0}, sparsity=TARGET, **more)
    return dataclasses.replace(plain, recipe=(RecipeStep("owl", (("spread", 0.2), ("threshold", 2.0))), *plain.recipe))


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """Calibrated on one window of two tokens: some of the four experts receive none."""
    source, store = ModelSource.open(save_model("mixtral", tmp_path / "model")), Store(tmp_path / "home")
    windows_SL = torch.randint(3, VOCABULARY, (4, 2), generator=torch.Generator().manual_seed(0))
    context = run_context(tmp_path / "run", store, source, sample(store, "general", windows_SL[:3]))
    collect(context.cached, source, context.samples["general", 0].sets)
    return context


def test_the_experts_that_see_tokens_share_the_target_and_the_others_stay_dense(context: RunContext) -> None:
    each = with_owl("owl", fallback="keep-dense")
    context = allocated(context, [each])
    for block in range(context.source.blocks):
        compress_block(context, block, [each])
    rows = [row for row in layer_rows(context, [each]) if not (row.fallback or "").startswith("left dense")]
    kept, solved = [row for row in rows if row.fallback], [row for row in rows if not row.fallback]
    assert kept
    assert all("experts" in row.layer and row.sparsity == 0 for row in kept)
    removed = sum(row.sparsity * (row.parameters or 0) for row in solved)
    assert abs(removed - TARGET * sum(row.parameters or 0 for row in solved)) <= len(solved) / 2
    assert len({round(row.sparsity, 2) for row in solved}) > 1


def test_without_a_fallback_the_solve_says_which_expert(context: RunContext) -> None:
    each = with_owl("owl")
    context = allocated(context, [each])
    with pytest.raises(EmptyStatistics, match="expert"):
        [compress_block(context, block, [each]) for block in range(context.source.blocks)]


def test_only_unsummarised_blocks_are_summarised(context: RunContext) -> None:
    each = with_owl("owl")
    assert unsummarised(context, [each]) == [0, 1, 2]
    assert summarise_block(context, 1, [each, dataclasses.replace(each, name="again")]) == 1
    assert unsummarised(context, [each]) == [0, 2]
    allocated(context, [each])  # computes the missing summaries
    assert unsummarised(context, [each]) == []
    assert summarise_block(context, 2, [each]) == 0
