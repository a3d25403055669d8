"""Mixtures that a plan leaves to a search: found once, reused by later runs, and never chosen by test text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from crosscal.errors import CrosscalError
from crosscal.evaluation import VALIDATION
from crosscal.flows.news import inputs_of
from crosscal.flows.pipeline import begin
from crosscal.plan import load_plan
from crosscal.report.rows import ResultRow, read_rows
from crosscal.stages import candidates, compress
from crosscal.tasks.corpora import draw_sample
from crosscal.tasks.evaluation import evaluation_set_of
from crosscal.tasks.mixtures import open_variants, rule_texts
from crosscal.variants import samples_needed
from tests.helpers.tiny_chats import chat_tokenizer, chats
from tests.helpers.tiny_place import Place, crosscal, make_place, values, write_documents

PRUNED = {"method": "sparsegpt", "sparsity": 0.5, "domain": "legal"}
AUTO = "sparsegpt-50-legal-auto"
RULE = {"auto": {"general_within": 0.05}}
RULED = f"{AUTO}-within0.05"
GENERAL_ONLY = "sparsegpt-50-general"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place with the same content for every test."""
    place = make_place(tmp_path)
    write(place)
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place whose run has finished."""
    place = make_place(tmp_path_factory.mktemp("made"))
    write(place)
    place.run()
    return place


def write(place: Place) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": [0, "auto", RULE]}], evaluate={"windows": 4})


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry, block and variant, for every solve of a candidate or a model."""
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


def test_the_balanced_weight_has_the_smallest_product_of_losses_of_all_that_were_solved(made: Place) -> None:
    found = choices(made.run_dir)[AUTO]
    tried = {one["weights"]["legal"]: one for one in found["tried"]}
    assert {0.0, 0.25, 0.5, 0.75, 1.0} < set(tried)
    assert len(tried) <= 7
    products = {weight: one["losses"]["general"] * one["losses"]["legal"] for weight, one in tried.items()}
    assert all(one["objective"] == pytest.approx(products[weight] ** 0.5) for weight, one in tried.items())
    assert found["weights"].get("legal", 0.0) == min(products, key=products.__getitem__)
    rows = [row for row in read_rows(made.run_dir / "results.jsonl", ResultRow) if row.variant == AUTO]
    assert all(row.mixture == found["weights"] for row in rows)
    assert all(row.found_by and "geometric mean" in row.found_by for row in rows)


def test_a_rule_takes_a_model_that_was_measured_to_keep_it(made: Place) -> None:
    found = choices(made.run_dir)[RULED]
    measured = {one["weights"]["legal"]: one["perplexity"] for one in found["tried"] if one["perplexity"]}
    assert 0.0 in measured
    assert len(measured) <= 1 + 3
    kept = {w: p for w, p in measured.items() if p["general"] <= 1.05 * measured[0.0]["general"]}
    best = min(kept, key=lambda weight: kept[weight]["legal"])
    assert found["weights"].get("legal", 0.0) == best
    rows = read_rows(made.run_dir / "results.jsonl", ResultRow)
    own = {row.corpus_or_task: row.value for row in rows if (row.variant, row.split) == (RULED, "validation")}
    assert own == pytest.approx(measured[best])
    assert not (made.run_dir / "candidates").exists()


def test_a_rule_says_how_finely_its_windows_tell(made: Place) -> None:
    lines = map(json.loads, (made.run_dir / "windows.jsonl").read_text().splitlines())
    nll = {one["variant"]: one["nll"] for one in lines if (one["corpus"], one["split"]) == ("general", "validation")}
    log = [taken - without for taken, without in zip(nll[RULED], nll[GENERAL_ONLY], strict=True)]
    ratio, stderr = math.exp(statistics.fmean(log)), statistics.stdev(log) / math.sqrt(len(log))
    said = f"keep the rule: {100 * (ratio - 1):+.1f} ± {100 * ratio * stderr:.1f} % of general-only's general"
    assert said in choices(made.run_dir)[RULED]["reason"]


def test_a_rule_says_how_many_windows_would_show_its_bound(place: Place) -> None:
    rule = {"auto": {"general_within": 0.0001}}
    place.write_plan(compress=[{**PRUNED, "alpha": rule}], evaluate={"windows": 2, "validation_windows": 2})
    [choice] = place.run()["choices"]
    said = re.search(r"; 2 windows show a change near the bound to ± .* %.*, about (\d+) would", choice["reason"])
    assert said is not None, choice["reason"]
    assert int(said[1]) > 2


def test_a_rule_on_a_single_window_says_that_it_shows_little(place: Place) -> None:
    for corpus in ("general", "legal"):
        write_documents(place.folder / corpus / "validation.jsonl", seed=corpus, count=1)
    rule = {"auto": {"general_within": 0.5}}
    place.write_plan(compress=[{**PRUNED, "alpha": rule}], evaluate={"windows": 2, "length": 64})
    [choice] = place.run()["choices"]
    assert choice["reason"].endswith("; a single window does not show how sure that is")


def test_the_model_is_the_one_that_a_plan_with_these_weights_asks_for(made: Place, place: Place) -> None:
    weights = choices(made.run_dir)[AUTO]["weights"]
    place.write_plan(compress=[{"method": "sparsegpt", "sparsity": 0.5, "mixture": weights}])
    place.run()
    [given] = (place.run_dir / "models").iterdir()
    shards = list(given.glob("block-*.safetensors"))
    assert shards
    for file in shards:
        assert file.read_bytes() == (made.run_dir / "models" / AUTO / file.name).read_bytes()


def test_a_search_that_is_over_costs_nothing_in_any_run(made: Place, solved: list[str]) -> None:
    again = made.run("--out", str(made.folder / "again"))
    assert solved == []
    assert again["choices"] == list(choices(made.run_dir).values())
    assert values(made.folder / "again" / "results.jsonl") == values(made.run_dir / "results.jsonl")


def test_one_that_was_interrupted_goes_on_and_ends_the_same(
    made: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"rows_of_block": 0, "solve_block": 0}
    for module, name in ((candidates, "rows_of_block"), (compress, "solve_block")):
        real = getattr(module, name)

        def failing(problem: Any, variants: Any, name: str = name, real: Any = real) -> Any:
            counts[name] += 1
            if counts[name] == 3:
                raise CrosscalError("the power went off")
            return real(problem, variants)

        monkeypatch.setattr(module, name, failing)
    for _ in counts:
        done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
        assert "the power went off" in done.err
    place.run()
    assert choices(place.run_dir) == choices(made.run_dir)


def test_nothing_is_chosen_by_test_text(made: Place, place: Place) -> None:
    for corpus in ("general", "legal"):
        file = place.folder / corpus / "test.jsonl"
        lines = [json.loads(line)["text"][::-1] for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    place.run()
    assert choices(place.run_dir) == choices(made.run_dir)
    assert values(place.run_dir / "results.jsonl") != values(made.run_dir / "results.jsonl")


def test_a_rule_looks_at_the_windows_that_the_run_measures(place: Place) -> None:
    (place.folder / "chats").mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        lines = [json.dumps({"messages": chat}) + "\n" for chat in chats(40, seed, longest=20)]
        (place.folder / "chats" / f"{split}.jsonl").write_text("".join(lines))
    chat_tokenizer("begin-once").save_pretrained(place.folder / "model")
    corpora = {"general": "general", "legal": {"path": "chats", "chat": "text"}}
    place.write_plan(corpora=corpora, compress=[{**PRUNED, "alpha": RULE}], evaluate={"windows": 4})
    begun = begin(load_plan(place.plan), str(place.home))
    [variant] = open_variants(begun.spec)
    measured = {
        text.corpus: text.digest
        for text in evaluation_set_of(begun.spec, begun.stored).texts
        if text.split == VALIDATION
    }
    assert {text.corpus: text.digest for text in rule_texts(begun.spec, begun.stored, variant)} == measured


@pytest.mark.parametrize("alpha", [0.5, "auto", RULE])
def test_held_out_text_that_lands_is_news_for_a_search_alone(place: Place, alpha: Any) -> None:
    place.write_plan(compress=[{**PRUNED, "alpha": alpha}], evaluate={"windows": 4, "validation_windows": 64})
    before = inputs(place)
    assert inputs(place) == before
    write_documents(place.folder / "legal" / "validation-1.jsonl", seed="more", count=5)
    assert (inputs(place) == before) == (alpha == 0.5)


def inputs(place: Place) -> str:
    begun = begin(load_plan(place.plan), str(place.home))
    spec, plan = begun.spec, begun.spec.parsed
    needed = samples_needed(plan, spec.variants())
    samples = [draw_sample.fn(spec, name, begun.stored[name], seed) for name, seed in needed]
    return inputs_of(dataclasses.replace(spec, samples=samples), begun.stored)


def test_a_rule_chooses_the_same_if_its_models_were_made_before(place: Place) -> None:
    tight = [{**PRUNED, "alpha": {"auto": {"general_within": 0.001}}}]
    place.write_plan(compress=tight, evaluate={"windows": 4})
    [found] = place.run("--home", str(place.folder / "fresh"))["choices"]
    weights = [one["weights"] for one in found["tried"] if one["perplexity"]]
    assert any(weight not in (0.0, 0.25, 0.5, 0.75, 1.0) for weight in found["weights"].values())
    place.write_plan(compress=[{"method": "sparsegpt", "sparsity": 0.5, "mixture": weights}], evaluate={"windows": 4})
    place.run("--out", str(place.folder / "given"))
    place.write_plan(compress=tight, evaluate={"windows": 4})
    [again] = place.run("--out", str(place.folder / "again"))["choices"]
    assert again == found


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


def test_a_choice_that_differs_from_an_earlier_one_leaves_nothing_of_it(made: Place) -> None:
    """Other validation windows may lead to another weight; its blocks are not mixed with those of the first choice."""
    run_dir = made.folder / "stale"
    shutil.copytree(made.run_dir, run_dir)
    stale = json.loads((run_dir / "choices.json").read_text())
    stale[1]["weights"] = {"legal": 0.123, "general": 0.877}
    (run_dir / "choices.json").write_text(json.dumps(stale))
    shard = run_dir / "models" / RULED / "block-00000.safetensors"
    right = shard.read_bytes()
    shard.write_bytes(right[:-4] + bytes(4))
    made.run("--out", str(run_dir))
    assert shard.read_bytes() == right
    assert choices(run_dir) == choices(made.run_dir)


def test_plan_check_says_what_is_to_be_found_and_refuses_sequential_inputs(place: Place) -> None:
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    assert json.loads(done.out)["mixtures_to_find"] == {
        AUTO: "7 mixtures solved at most, none evaluated",
        RULED: "5 mixtures solved; the dense model, general-only and 3 more at most evaluated on validation windows",
    }
    place.write_plan(compress=[{**PRUNED, "alpha": "auto", "upstream": "sequential"}])
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home))
    assert done.code == 2
    assert "Find the mixture with `upstream: dense`" in done.err
    assert "Traceback" not in done.err
