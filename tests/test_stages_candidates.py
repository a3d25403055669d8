"""Losses on each corpus's held-out text, compared with float64 for several solving mixtures; and the variants that are
not evaluated because of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from crosscal.report.rows import NOT_EVALUATED, ResultRow, read_rows
from crosscal.stages import compress
from crosscal.stages.candidates import Candidate, losses_of, measure_block, unmeasured
from crosscal.stages.compress import RunContext
from crosscal.stages.screen import screened
from crosscal.stages.solve import rows_of_block, solve_block
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.made_up_run import layer
from tests.helpers.tiny_place import crosscal, make_place, values
from tests.helpers.tiny_run import collect, run_context, sample, tiny_source, variant, windows

CORPORA = ("general", "legal")


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """Two corpora of different tokens, each with two shards of different weights."""
    source, store = tiny_source(tmp_path / "model"), Store(tmp_path / "home")
    samples = [
        sample(store, corpus, windows(6, seed, low, high), windows(4, seed + 10, low, high))
        for corpus, seed, low, high in (("general", 1, 3, 200), ("legal", 2, 150, 400))
    ]
    context = run_context(tmp_path / "run", store, source, *samples)
    collect(context.cached, source, [key for each in samples for key in each.sets])
    return dataclasses.replace(context, measured_on=CORPORA)


def mixed(name: str, alpha: float = 0.5, **more: object) -> Variant:
    weights = {"general": 1 - alpha, "legal": alpha}
    return variant(name, "sparsegpt", weights, **({"sparsity": 0.5} | more))


@pytest.mark.parametrize("trace_normalised", [False, True])
def test_losses_are_those_of_float64_on_each_corpus_alone(context: RunContext, trace_normalised: bool) -> None:
    solved = [
        mixed("pruned", trace_normalised=trace_normalised),
        mixed("legal alone", alpha=1.0),
        variant("rounded", "gptq", {"general": 0.75, "legal": 0.25}, bits=3, group_size=32),
    ]
    problem = context.problem(1, context.cached)
    found = solve_block(problem, solved)
    for each in solved:
        rows = {row.layer: row for row in found[each.name].rows}
        for site in problem.sites:
            for matrix in site.matrices:
                before_OI = matrix.weight_OI(problem.parameters).double()
                after_OI = found[each.name].dense[matrix.parameter].double()
                losses = rows[f"{problem.name}.{matrix.name}"].corpus_losses
                assert losses is not None
                for corpus in CORPORA:
                    hessian_II = torch.zeros(site.inputs, site.inputs, dtype=torch.float64)
                    for part in context.samples[corpus, 0].held_out.parts:
                        moments = context.cached.read(part.key, block=1, site=site)
                        hessian_II += part.weight * moments.gram_II.double()
                    away_OI = before_OI - after_OI
                    loss = torch.trace(away_OI @ hessian_II @ away_OI.T)
                    energy = torch.trace(before_OI @ hessian_II @ before_OI.T)
                    assert losses[corpus] == pytest.approx(float(loss / energy), rel=1e-3)


def test_measuring_changes_no_solution(context: RunContext) -> None:
    each = mixed("pruned")
    plain = dataclasses.replace(context, measured_on=())
    with_losses = solve_block(context.problem(0, context.cached), [each])["pruned"]
    without = solve_block(plain.problem(0, context.cached), [each])["pruned"]
    assert all(torch.equal(with_losses.changed[name], tensor) for name, tensor in without.changed.items())
    assert [row.heldout_relative_loss for row in with_losses.rows] == [r.heldout_relative_loss for r in without.rows]
    assert all(row.corpus_losses is None for row in without.rows)


def test_candidates_are_measured_once_whatever_they_are_called(context: RunContext) -> None:
    tried = [Candidate(mixed("a"), CORPORA), Candidate(mixed("b", alpha=0.25), CORPORA)]
    assert losses_of(context, tried[0]) is None
    assert unmeasured(context, tried) == [0, 1]
    assert [measure_block(context, block, tried) for block in (0, 1)] == [2, 2]
    again = Candidate(dataclasses.replace(tried[0].variant, name="again"), CORPORA)
    assert unmeasured(context, [again, tried[1]]) == []
    assert losses_of(context, again) == losses_of(context, tried[0])
    rows = [row for b in (0, 1) for row in rows_of_block(context.problem(b, context.cached), [tried[0].variant])["a"]]
    means = {c: sum((row.corpus_losses or {})[c] for row in rows) / len(rows) for c in CORPORA}
    assert losses_of(context, tried[0]) == pytest.approx(means)
    assert unmeasured(context, [Candidate(tried[0].variant, ("legal",))]) == [0, 1]


def test_only_variants_of_one_level_that_solved_the_same_matrices_are_compared(context: RunContext) -> None:
    asked = [
        variant("magnitude", "magnitude", None, sparsity=0.7),
        mixed("good", sparsity=0.7),
        mixed("lighter", sparsity=0.3),
        dataclasses.replace(variant("left", "magnitude", None, sparsity=0.7), leave_dense=("*.down_proj",)),
    ]
    problem = context.problem(0, context.cached)
    rows = rows_of_block(problem, asked)
    found = screened(asked, rows)
    assert set(found) == {"magnitude"}
    assert found["magnitude"].startswith(f"{NOT_EVALUATED}good loses at least 5% less on every corpus (general 0.")
    assert screened(asked, rows, spared=["magnitude"]) == {}
    unknown = {name: [dataclasses.replace(row, corpus_losses=None) for row in own] for name, own in rows.items()}
    assert screened(asked, unknown) == {}


def test_variants_that_differ_in_seed_alone_are_skipped_together_or_not_at_all() -> None:
    of_two_draws = itertools.product(("good", "bad"), (0, 1))
    each = [(variant(f"{name}-s{seed}", "wanda", {"general": 1.0}, sparsity=0.5), seed) for name, seed in of_two_draws]
    asked = [dataclasses.replace(one, seed=seed) for one, seed in each]

    def skipped(*losses: float, spared: Sequence[str] = ()) -> set[str]:
        rows = {
            one.name: [layer(one.name, 0, "q", corpus_losses={"general": loss})]
            for one, loss in zip(asked, losses, strict=True)
        }
        return set(screened(asked, rows, spared))

    assert skipped(1.0, 1.0, 2.0, 2.0) == {"bad-s0", "bad-s1"}
    assert skipped(1.0, 1.0, 2.0, 1.0) == set()
    assert skipped(1.0, 1.0, 2.0, 2.0, spared=["bad-s1"]) == set()


@pytest.mark.parametrize("keep_models", [True, False])
def test_a_run_lists_what_it_did_not_evaluate_and_says_why(tmp_path: Path, keep_models: bool) -> None:
    place = make_place(tmp_path)
    sweep = [
        {"method": ["sparsegpt", "magnitude"], "sparsity": 0.7, "domain": "legal", "alpha": 0.5},
        {"method": "rtn", "bits": 4, "group_size": 32},
    ]
    place.write_plan(
        compress=sweep,
        evaluate={"windows": 4, "screen": True},
        execution={"device": "cpu", "keep_models": keep_models},
    )
    for _ in range(2):
        record = place.run()
        rows = read_rows(place.run_dir / "results.jsonl", ResultRow)
        spared = [row for row in rows if row.variant == "magnitude-70"]
        assert {(row.corpus_or_task, row.split) for row in spared} == {
            (corpus, split) for corpus in CORPORA for split in ("test", "validation")
        }
        assert all(row.value is None for row in spared)
        assert all((row.skipped or "").startswith(f"{NOT_EVALUATED}sparsegpt-70-legal-a0.5 loses") for row in spared)
        assert all(row.value is not None for row in rows if row.variant != "magnitude-70")
        assert any("not evaluated" in note and "magnitude-70" in note for note in record["notes"])
        assert record["failed"] == {}
        assert (place.run_dir / "models" / "magnitude-70").is_dir() == keep_models
        page = (place.run_dir / "report.html").read_text()
        assert "1 variant not evaluated" in page
        assert "magnitude-70: not evaluated: sparsegpt-70-legal-a0.5 loses" in page
    layers = [json.loads(line) for line in (place.run_dir / "layers.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in layers} == {"sparsegpt-70-legal-a0.5", "magnitude-70", "rtn-w4g32"}


SCREENED = [{"method": ["sparsegpt", "magnitude"], "sparsity": 0.7, "domain": "legal", "alpha": 0.5}]


def test_a_variant_that_was_not_evaluated_is_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    evaluate, execution = {"windows": 4, "screen": True}, {"device": "cpu", "keep_models": False}
    place.write_plan(compress=SCREENED, evaluate=evaluate, execution=execution)
    place.run()
    results = place.run_dir / "results.jsonl"
    first = values(results)
    monkeypatch.setattr(compress, "solve_block", lambda *_: pytest.fail("solved again"))
    place.run()
    assert values(results) == first
    assert NOT_EVALUATED in results.read_text()


def test_a_run_with_a_screen_takes_nothing_from_one_without(tmp_path: Path) -> None:
    """Blocks that were solved without losses on every corpus cannot be compared."""
    place, screened_dir = make_place(tmp_path), tmp_path / "screened"
    place.write_plan(compress=SCREENED)
    place.run()
    place.write_plan(compress=SCREENED, evaluate={"windows": 4, "screen": True})
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 2
    assert "`evaluate.screen` differ" in done.err
    place.run("--out", str(screened_dir))
    rows = read_rows(screened_dir / "results.jsonl", ResultRow)
    assert {row.variant for row in rows if row.value is None} == {"magnitude-70"}
