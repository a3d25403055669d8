"""The plans that come with the project run unchanged; those of papers need the hub and follow their protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscal.flows.study import check_study
from crosscal.plan import WORD, dump_plan, load_plan, parse_plan
from crosscal.report.counterparts import counterpart
from crosscal.report.groups import groups_of
from crosscal.report.rows import ResultRow
from crosscal.variants import Variant, variants
from tests.helpers.made_up_run import result

FOLDER = Path(__file__).parents[1] / "plans"
PAPERS = sorted(FOLDER.glob("paper-*.yaml"))
PLANS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "service" and path not in PAPERS)


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


PROTOCOLS = {
    # paper: (draws, windows, length, models per draw, methods, mixtures per method)
    "paper-self-calibration": (5, 128, 2048, 4 * 5, {"sparsegpt", "wanda", "gptq", "awq+rtn"}, 5),
    "paper-calibration-data": (10, 128, 2048, 4 * 5, {"sparsegpt", "wanda", "gptq", "spqr"}, 5),
    "paper-beware-calibration": (20, 128, 2048, 4 * 3, {"wanda", "owl+wanda"}, 3),
    "paper-d-pruner": (5, 128, 2048, 2 * 5, {"sparsegpt", "gblm", "magnitude"}, 5),
    "paper-cross-calibration": (5, 512, 2048, 3 * 9, {"sparsegpt", "wanda", "gptq"}, 9),
}


def protocol(path: Path) -> tuple[Any, ...]:
    plan = load_plan(path)
    of_a_draw = [variant for variant in variants(plan) if variant.seed == 0 and variant.mixture]
    mixtures = {variant.mixture for variant in of_a_draw}
    methods = {variant.method for variant in variants(plan)}
    calibration = plan.calibration
    return (len(plan.seeds), calibration.windows, calibration.length, len(of_a_draw), methods, len(mixtures))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_plan_of_a_paper_holds_its_protocol(path: Path) -> None:
    assert protocol(path) == PROTOCOLS[path.stem]
    plan = load_plan(path)
    check_study(plan)
    assert parse_plan(yaml.safe_load(dump_plan(plan))) == plan
    assert "/" in plan.model
    assert not Path(plan.model).is_absolute(), "an id of the hub stays one"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_model_of_a_paper_s_plan_is_compared_with_a_baseline(path: Path) -> None:
    """All except the baselines: for each method, the model calibrated on the first corpus alone."""
    plan = load_plan(path)
    assert plan.study
    groups = groups_of([result(), *map(row_of, variants(plan))], [])
    rules = plan.study.baseline
    alone = {group.name for group in groups if not any(counterpart(group, rule, groups) for rule in rules)}
    first = next(iter(plan.corpora))
    assert alone <= {group.name for group in groups if group.is_dense or group.mixture == {first: 1.0}}
    assert len(groups) == 1 + len(variants(plan)) // len(plan.seeds) + (path.stem == "paper-d-pruner")


def row_of(variant: Variant) -> ResultRow:
    return result(
        variant.name,
        method=variant.method,
        setting=variant.setting,
        amounts=[amount.as_row() for amount in variant.amounts],
        upstream=variant.upstream,
        mixture=variant.mixture.as_dict() if variant.mixture else {},
        seed=variant.seed,
    )


@pytest.mark.slow
def test_the_tasks_of_a_paper_s_plan_are_lm_eval_s() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    asked = {task for path in PAPERS for task in load_plan(path).evaluate.tasks}
    assert asked
    assert asked <= known
