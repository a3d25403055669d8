"""A sample of the table in docs/families.md: model families that need different handling in a walk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.processes import script_output

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLE = {
    "gemma4_text": "odd",  # later blocks read keys and values of earlier ones; per-layer inputs
    "gemma3n_text": "odd",  # a dimension of streams before that of the windows
    "deepseek_v4": "odd",  # streams, grouped linears, experts chosen by token
    "glm_moe_dsa": "odd",  # a block selects positions for the next block
    "zamba": "ordinary",  # blocks share weights, and read the embeddings
    "jamba": "odd",  # weights used without their module
    "falcon_h1": "ordinary",  # a table that the model fills for its blocks
    "dbrx": "odd",  # experts stacked as rows of one matrix
    "jetmoe": "odd",  # attention with experts
    "qwen3_next": "coinciding",  # as many experts as inputs
    "llava": "ordinary",  # with a vision tower
    "bart": "odd",  # cross-attention that gets no input
}


@pytest.mark.parametrize(("family", "size"), SAMPLE.items())
def test_a_family_from_outside(family: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from families import one

    found = one(family, size)
    assert found.faults == []
    assert found.runs, found.refused_by_check or found.not_built
    assert found.solved > 0
    assert bool(found.leave_dense) == (family in ("bart", "zamba"))


def test_the_table_is_that_of_the_results() -> None:
    script_output(BENCHMARKS / "families.py", "--check")
