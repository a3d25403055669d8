"""Mixtures that a plan leaves open: found once, the same whoever asks again, and never from test text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crosscal.errors import CrosscalError
from crosscal.report.rows import LayerRow, ResultRow, read_rows
from crosscal.stages import candidates, compress
from crosscal.store import Store
from tests.helpers.tiny_place import Place, crosscal, make_place, values

PRUNED = {"method": "sparsegpt", "sparsity": 0.5, "domain": "legal"}
AUTO = "sparsegpt-50-legal-auto"
RULE = {"auto": {"general_within": 0.05}}
RULED = f"{AUTO}-within0.05"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every solve, of candidates and of models, by block and by the names of the variants."""
    seen: list[str] = []
    for module, name in ((candidates, "rows_of_block"), (compress, "solve_block")):
        real = getattr(module, name)

        def counting(problem: Any, variants: Any, real: Any = real) -> Any:
            seen.extend(f"{problem.block} {variant.name}" for variant in variants)
            return real(problem, variants)

        monkeypatch.setattr(module, name, counting)
    return seen


def choices(run_dir: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((run_dir / "run.json").read_text())["choices"]
    assert found == json.loads((run_dir / "choices.json").read_text())
    return {one["variant"]: one for one in found}


def test_the_balanced_weight_has_the_smallest_product_of_losses_of_all_that_were_solved(place: Place) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": [0, "auto", 1]}])
    place.run()
    found = choices(place.run_dir)[AUTO]
    tried = {one["weights"]["legal"]: one for one in found["tried"]}
    assert {0.0, 0.25, 0.5, 0.75, 1.0} < set(tried)
    assert len(tried) <= 7
    products = {weight: one["losses"]["general"] * one["losses"]["legal"] for weight, one in tried.items()}
    assert all(one["objective"] == pytest.approx(products[weight] ** 0.5) for weight, one in tried.items())
    best = min(products, key=products.__getitem__)
    assert found["weights"].get("legal", 0.0) == best
    rows = [row for row in read_rows(place.run_dir / "results.jsonl", ResultRow) if row.variant == AUTO]
    assert all(row.mixture == found["weights"] for row in rows)
    assert all(row.found_by and "geometric mean" in row.found_by for row in rows)


def test_the_model_is_the_one_that_a_plan_with_these_weights_asks_for(place: Place) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": "auto"}])
    place.run()
    weights = choices(place.run_dir)[AUTO]["weights"]
    place.write_plan(compress=[{"method": "sparsegpt", "sparsity": 0.5, "mixture": weights}])
    place.run("--home", str(place.folder / "other home"), "--out", str(place.folder / "other"))
    [given] = (place.folder / "other" / "models").iterdir()
    for file in given.glob("block-*.safetensors"):
        assert file.read_bytes() == (place.run_dir / "models" / AUTO / file.name).read_bytes()


def test_a_search_that_is_over_costs_nothing_in_any_run(place: Place, solved: list[str]) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": ["auto", RULE]}])
    first = place.run()
    assert solved
    solved.clear()
    again = place.run("--out", str(place.folder / "again"))
    assert solved == []
    assert again["choices"] == first["choices"]
    assert values(place.folder / "again" / "results.jsonl") == values(place.run_dir / "results.jsonl")


def test_one_that_was_interrupted_goes_on_and_ends_the_same(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": ["auto", RULE]}])
    calm = place.run("--home", str(place.folder / "home2"), "--out", str(place.folder / "calm"))["choices"]
    counts = {"rows_of_block": 0, "solve_block": 0}
    for module, name, at in ((candidates, "rows_of_block", 3), (compress, "solve_block", 3)):
        real = getattr(module, name)

        def failing(problem: Any, variants: Any, name: str = name, at: int = at, real: Any = real) -> Any:
            counts[name] += 1
            if counts[name] == at:
                raise CrosscalError("the power went off")
            return real(problem, variants)

        monkeypatch.setattr(module, name, failing)
    for _ in range(2):
        done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
        assert "the power went off" in done.err
    assert place.run()["choices"] == calm


def test_a_rule_takes_a_model_that_was_measured_to_keep_it(place: Place) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": [0, RULE]}], evaluate={"windows": 4, "validation_windows": 4})
    place.run()
    found = choices(place.run_dir)[RULED]
    measured = {one["weights"]["legal"]: one["perplexity"] for one in found["tried"] if one["perplexity"]}
    assert 0.0 in measured
    assert len(measured) <= 1 + 3
    kept = {w: p for w, p in measured.items() if p["general"] <= 1.05 * measured[0.0]["general"]}
    best = min(kept, key=lambda weight: kept[weight]["legal"])
    assert found["weights"].get("legal", 0.0) == best
    rows = read_rows(place.run_dir / "results.jsonl", ResultRow)
    own = {row.corpus_or_task: row.value for row in rows if (row.variant, row.split) == (RULED, "validation")}
    assert own == pytest.approx(measured[best])
    assert not (place.run_dir / "candidates").exists()


def test_nothing_is_chosen_by_test_text(place: Place) -> None:
    entry = {**PRUNED, "alpha": ["auto", RULE]}
    place.write_plan(compress=[entry])
    before = place.run()["choices"]
    for corpus in ("general", "legal"):
        file = place.folder / corpus / "test.jsonl"
        lines = [json.loads(line)["text"][::-1] for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    after = place.run("--home", str(place.folder / "home2"), "--out", str(place.folder / "other"))["choices"]
    assert after == before


def test_every_seed_finds_its_own_and_several_corpora_find_one_mixture(place: Place) -> None:
    place.write_plan(
        corpora={"general": "general", "legal": "legal", "noise": "random"},
        calibration={"windows": 8, "length": 32, "held_out_windows": 4, "seed": [0, 1]},
        compress=[{"method": "wanda", "sparsity": 0.5, "mixture": {"auto": {"general": 1, "legal": 2, "noise": 1}}}],
    )
    place.run()
    found = choices(place.run_dir)
    name = "wanda-50-general1-legal2-noise1-auto"
    assert set(found) == {f"{name}-s0", f"{name}-s1"}
    for one in found.values():
        assert len(one["tried"]) <= 8
        assert one["tried"]
        assert sum(one["weights"].values()) == pytest.approx(1.0)
        objective = min(each["objective"] for each in one["tried"])
        [taken] = [each for each in one["tried"] if each["weights"] == one["weights"]]
        assert taken["objective"] == objective
    report = (place.run_dir / "report.html").read_text()
    assert name in report


def test_a_choice_that_differs_from_an_earlier_one_leaves_nothing_of_it(place: Place) -> None:
    """Perplexities on other validation windows may take another weight: its blocks are not mixed with the first's."""
    place.write_plan(compress=[{**PRUNED, "alpha": RULE}])
    place.run()
    file = place.run_dir / "choices.json"
    stale = json.loads(file.read_text())
    stale[0]["weights"] = {"legal": 0.123, "general": 0.877}
    file.write_text(json.dumps(stale))
    shard = place.run_dir / "models" / RULED / "block-00000.safetensors"
    right, shard_rows = shard.read_bytes(), place.run_dir / "layers" / RULED / "block-00000.jsonl"
    shard.write_bytes(right[:-4] + b"\0\0\0\0")
    place.run()
    assert shard.read_bytes() == right
    assert read_rows(shard_rows, LayerRow)


def test_the_command_line_refuses_sequential_inputs_in_one_message(place: Place) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": "auto", "upstream": "sequential"}])
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home))
    assert done.code == 2
    assert "Find the mixture with `upstream: dense`" in done.err
    assert "Traceback" not in done.err


def test_a_damaged_store_of_losses_is_no_other_choice(place: Place) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": "auto"}])
    before = place.run()["choices"]
    store = Store(place.home)
    for _, key in list(store.keys(candidates.KIND))[::3]:
        store.discard(candidates.KIND, key)
    assert place.run("--out", str(place.folder / "again"))["choices"] == before
