"""A sample of the table in docs/families.md: families that differ in what a walk has to understand, from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.processes import script_output

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLE = {
    "gemma4_text": "odd",  # later blocks read keys and values of earlier ones; per-layer inputs
    "gemma3n_text": "odd",  # streams before the windows
    "deepseek_v4": "odd",  # streams, linears in groups, experts chosen by token
    "glm_moe_dsa": "odd",  # a block chooses positions for the next
    "zamba": "ordinary",  # blocks share weights, and read the embeddings
    "jamba": "odd",  # weights used without their module
    "falcon_h1": "ordinary",  # a table that the model fills for its blocks
    "dbrx": "odd",  # experts one below the other
    "jetmoe": "odd",  # experts of attention
    "qwen3_next": "coinciding",  # as many experts as inputs
    "llava": "ordinary",  # beside a vision tower
    "bart": "odd",  # cross-attention that no text reaches
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
