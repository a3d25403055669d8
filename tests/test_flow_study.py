"""However it is split into parts, a study gives the numbers of one run over all draws and computes none twice."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from crosscal.flows.study_files import together
from crosscal.tasks import evaluation
from tests.helpers.tiny_place import Place, crosscal, make_place, values, write_documents
from tests.helpers.tiny_text import SENTENCES

COMPRESS = [
    {"method": "sparsegpt", "sparsity": 0.5, "domain": "legal", "alpha": [0, 0.5, 1]},
    {"method": "magnitude", "sparsity": 0.5},
]
WINDOWS = {"windows": 4, "validation_windows": 2}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    place.write_plan(compress=COMPRESS, evaluate=WINDOWS, study={"draws": 2, "models_at_once": 2})
    return place


def study(place: Place, *extra: str) -> dict[str, Any]:
    folder = place.folder / "study"
    done = crosscal("study", str(place.plan), "--home", str(place.home), "--out", str(folder), "--json", *extra)
    assert done.code == 0, done.err
    return json.loads(done.out)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_parts_give_what_one_run_gives_and_hold_so_many_models_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, measure = [], evaluation.measure

    def counting(*arguments: Any, **more: Any) -> Any:
        at_once.append(len(list(place.folder.glob("study/**/model.safetensors.index.json"))))
        return measure(*arguments, **more)

    monkeypatch.setattr(evaluation, "measure", counting)
    asked = [{"question": f"{one} Is it so?", "choices": ["yes", "no"], "answer": 0} for one in SENTENCES]
    papers = [{"text": f"{one} {two}", "short": two} for one, two in itertools.pairwise(SENTENCES)]
    for name, records in (("first", asked), ("second", asked[:4]), ("papers", papers[:3])):
        (place.folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    summaries = {"summaries": "papers.jsonl", "document": "text", "reference": "short", "new_tokens": 4}
    measured = {**WINDOWS, "tasks": ["first.jsonl", "second.jsonl", summaries]}
    place.write_plan(compress=COMPRESS, evaluate=measured, study={"draws": 2, "models_at_once": 2})
    record = study(place)
    assert record["parts"] == {"complete": 4, "of": 4}
    assert max(at_once) == 2
    assert not list(place.folder.glob("study/**/*.safetensors")), "models are discarded once measured"

    calibration = {"windows": 8, "length": 32, "held_out_windows": 4, "seed": [0, 1]}
    place.write_plan(compress=COMPRESS, evaluate=measured, calibration=calibration)
    place.run("--home", str(place.folder / "another home"))
    assert sorted(values(place.folder / "study" / "results.jsonl")) == sorted(values(place.run_dir / "results.jsonl"))
    for name in ("windows.jsonl", "questions.jsonl", "summaries.jsonl"):
        one, together = (
            sorted(map(json.dumps, rows(folder / name))) for folder in (place.run_dir, place.folder / "study")
        )
        assert together == one, name


def test_it_goes_on_where_it_stopped_and_a_further_draw_costs_that_draw(place: Place) -> None:
    first = study(place, "--parts", "1")
    assert first["parts"] == {"complete": 1, "of": 4}
    numbers = study(place)
    assert numbers["calibration_tokens_read"] == 2 * 2 * 12 * 32
    assert [row["draws"] for row in rows(place.folder / "study" / "study.jsonl") if row["rule"]] == [2] * 6

    cut = next(place.folder.glob("study/parts/*"))
    (cut / "run.json").unlink()
    assert study(place)["parts"] == {"complete": 4, "of": 4}
    assert json.loads((cut / "run.json").read_text())["calibration_tokens_read"] == 0, "the store has what was read"

    before = {file: file.stat().st_mtime_ns for file in place.folder.glob("study/parts/*/results.jsonl")}
    more = study(place, "--set", "study.draws=3")
    of_third = [json.loads(file.read_text()) for file in place.folder.glob("study/parts/s2-*/run.json")]
    assert sum(record["calibration_tokens_read"] for record in of_third) == 2 * 12 * 32
    assert before == {file: file.stat().st_mtime_ns for file in before}, "what is complete is not opened again"
    assert more["parts"] == {"complete": 6, "of": 6}
    assert {row["draws"] for row in rows(place.folder / "study" / "study.jsonl") if row["rule"]} == {3}


def test_other_text_makes_other_parts(place: Place) -> None:
    study(place, "--parts", "1")
    with (place.folder / "general" / "train.jsonl").open("a") as file:
        file.write('{"text": "a document that was not there before"}\n')
    assert study(place, "--parts", "0")["parts"] == {"complete": 0, "of": 4}


def test_parts_are_known_by_the_content_of_corpora_and_tasks(place: Place) -> None:
    """In another store, other text has the same name and version, and the same text is the same."""

    def complete(*extra: str) -> int:
        return study(place, "--parts", "0", *extra)["parts"]["complete"]

    asked, task = place.folder / "asked.jsonl", {"question": "Is it so?", "choices": ["yes", "no"], "answer": 0}
    asked.write_text(json.dumps(task) + "\n")
    place.write_plan(compress=COMPRESS[1:], evaluate={**WINDOWS, "tasks": ["asked.jsonl"]}, study={"draws": 1})
    assert study(place)["parts"] == {"complete": 1, "of": 1}
    asked.write_text(json.dumps({**task, "answer": 1}) + "\n")
    assert complete() == 0
    asked.write_text(json.dumps(task) + "\n")
    assert complete() == complete("--home", str(place.folder / "second")) == 1
    write_documents(place.folder / "general" / "test.jsonl", seed="other", count=20)
    assert complete("--home", str(place.folder / "third")) == 0


def test_a_study_describes_every_corpus_and_counts_every_draw_once(place: Place) -> None:
    calibration = {"windows": 8, "length": 32, "held_out_windows": 4, "sufficiency": True}
    sweep = [{"method": "sparsegpt", "sparsity": 0.5, "domain": "legal", "alpha": [0, 0.5, 1]}]
    asked = {"compress": sweep, "evaluate": WINDOWS}
    place.write_plan(**asked, calibration=calibration, study={"draws": 2, "models_at_once": 1})
    found = study(place)
    place.write_plan(**asked, calibration={**calibration, "seed": [0, 1]})
    one = place.run()
    assert found["parts"] == {"complete": 6, "of": 6}
    for name in ("calibration_tokens", "calibration_quality", "starved_experts"):
        assert found[name] == one[name], name
    assert [curve["corpus"] for curve in found["sufficiency"]] == ["general", "legal"]
    samples = [(folder / "samples.json").read_text() for folder in (place.folder / "study", place.run_dir)]
    assert samples[0] == samples[1]


def test_descriptions_are_those_of_the_first_part_that_has_the_corpus() -> None:
    def record(corpus: str, number: int) -> dict[str, Any]:
        by_corpus = {name: {corpus: number} for name in ("calibration_quality", "starved_experts")}
        costs = {"stages": {}, "cache": {}, "calibration_tokens_read": 1, "peak_rss_bytes": 1}
        draws = [{"corpus": corpus, "seed": 0, "tokens": 8}]
        return {**by_corpus, **costs, "failed": {}, "notes": [], "calibration_draws": draws}

    found = together([record("general", 1), record("legal", 2), record("general", 3)])
    assert found["starved_experts"] == found["calibration_quality"] == {"general": 1, "legal": 2}
    assert (found["calibration_tokens"], found["calibration_tokens_read"]) == (16, 3)


def test_plan_check_says_how_a_study_is_cut_and_counts_the_disk_of_one_part(place: Place) -> None:
    def check(*extra: str) -> dict[str, Any]:
        return json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json", *extra).out)

    found, one = check(), check("--set", "study.models_at_once=1")
    tokens = 7 * (4 + 2) * 32 * 2
    assert found["study"] == {"draws": 2, "parts": 4, "models": 7, "evaluation_tokens_at_most": tokens}
    assert found["disk"]["models_bytes"] == 2 * one["disk"]["models_bytes"]
    assert found["calibration_tokens_to_read"] == 2 * 2 * 12 * 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["study=null"], "the plan has no study"),
        (["study.baseline=nonsense"], "nothing to compare with (got nonsense)"),
        (["execution={device: cpu, keep_models: true}"], "a study keeps numbers"),
        (["calibration.seed=[1, 2, 3]"], "calibration.seed lists 3"),
        (["study.draws=0"], "study.draws"),
        (["calibration.seed=[0, 0, 1]", "study.draws=3"], "calibration.seed: 0 more than once"),
        (["evaluate.screen=true"], "a study measures every variant on every window"),
    ],
)
def test_mistakes_are_one_message(place: Place, changes: list[str], said: str) -> None:
    done = crosscal("study", str(place.plan), "--home", str(place.home), *(f"--set={change}" for change in changes))
    assert done.code == 2
    assert said in done.err
    assert not place.home.exists()


def test_a_domain_in_the_store_stands_for_the_word_of_a_plan(place: Place) -> None:
    landed = crosscal("ingest", str(place.folder / "legal"), "--corpus", "legal", "--home", str(place.home))
    assert landed.code == 0, landed.err
    named = study(place)
    place.write_plan(
        corpora={"general": "general", "$domain": {}},
        compress=[{**each, "domain": "$domain"} if "domain" in each else each for each in COMPRESS],
        evaluate=WINDOWS,
        study={"draws": 2, "models_at_once": 2},
    )
    before = values(place.folder / "study" / "results.jsonl")
    filled = study(place, "--domain", "legal", "--out", str(place.folder / "of the domain"))
    assert filled["parts"] == named["parts"]
    assert filled["calibration_tokens_read"] == 0, "it is the same text"
    assert sorted(values(place.folder / "of the domain" / "results.jsonl")) == sorted(before)
    done = crosscal("study", str(place.plan), "--home", str(place.home), "--domain", "legla")
    assert done.code == 1
    assert "legla" in done.err
