"""The plans that come with the project can be run as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosscal.plan import load_plan
from crosscal.variants import variants

PLANS = sorted((Path(__file__).parents[1] / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_is_complete(path: Path) -> None:
    plan = load_plan(path)
    assert variants(plan)
    assert Path(plan.model).is_dir()
    for documents in plan.document_corpora.values():
        assert documents.path
        assert all(Path(place).exists() for place in documents.path)
    assert all(Path(task).is_file() for task in plan.evaluate.tasks)
