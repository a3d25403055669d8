"""The plans that come with the project can be run as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosscal.plan import WORD, load_plan
from crosscal.variants import variants

PLANS = sorted(path for path in (Path(__file__).parents[1] / "plans").glob("*.yaml") if path.stem != "service")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_is_complete(path: Path) -> None:
    domain = "biomedical" if WORD in path.read_text() else None
    plan = load_plan(path, domain=domain)
    assert variants(plan)
    assert Path(plan.model).is_dir()
    for name, documents in plan.document_corpora.items():
        assert documents.path or name == domain, "only what lands may come from the store alone"
        assert all(Path(place).exists() for place in documents.path or ())
    assert all(Path(task).is_file() for task in plan.evaluate.tasks)
