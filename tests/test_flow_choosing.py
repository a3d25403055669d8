"""A plan that selects documents and lets the model continue some: first run, reuse, and a new run as the pool grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosscal.errors import PlanError
from crosscal.plan import dump_plan, load_plan, parse_plan
from tests.helpers.tiny_place import crosscal, make_place, write_documents

CHOSEN = {"method": "dsir", "towards": "sample", "documents": 20, "least_words": 5}
CORPORA = {
    "general": "general",
    "sample": "legal",
    "legal": {"path": "general", "select": CHOSEN},
    "seeded": {"source": "self", "seeds": "legal", "prefix_tokens": 8},
}


def test_a_plan_that_chooses(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.write_plan(
        corpora=CORPORA,
        compress=[{"method": "wanda", "sparsity": 0.5, "mixture": [{"legal": 1}, {"seeded": 0.5, "legal": 0.5}]}],
        evaluate={"windows": 4, "perplexity": ["sample", "legal"]},
    )
    first = place.run()
    chosen = first["corpora"]["legal"]["selection"]
    assert (chosen["pool"], chosen["sample"], chosen["chosen"]) == (60, 60, 20)
    assert any("legal: 20 of 60 documents chosen by dsir towards 60 of sample" in note for note in first["notes"])
    rows = [json.loads(line) for line in (place.run_dir / "results.jsonl").read_text().splitlines()]
    by_corpus = {name: [r["value"] for r in rows if r["corpus_or_task"] == name] for name in ("sample", "legal")}
    assert by_corpus["sample"] == by_corpus["legal"] != []  # both are measured on the sample's test text
    report = (place.run_dir / "report.html").read_text()
    assert "seeded: written by the model itself, continuing documents of legal" in report
    assert "legal: documents chosen by dsir towards sample" in report
    again = place.run()
    assert again["calibration_tokens_read"] == 0
    assert again["corpora"]["legal"]["selection"] == chosen
    assert again["corpora"]["legal"]["version"] == 1
    told = json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)
    assert {reading["state"] for reading in told["reading"]} == {"cached"}
    write_documents(tmp_path / "general" / "train-more.jsonl", seed="landed", count=30)
    grown = place.run("--out", str(tmp_path / "grown"))
    assert grown["corpora"]["legal"]["selection"]["pool"] == 90
    assert grown["corpora"]["legal"]["selection"]["key"] != chosen["key"]
    assert grown["calibration_tokens_read"] > 0


def test_enough_measures_the_text_that_a_run_calibrates_on(tmp_path: Path) -> None:
    """Chosen documents, and text that continues documents which no mixture contains."""
    place = make_place(tmp_path)
    chosen = {"path": "legal", "select": {"documents": 6}}
    written = {"source": "self", "seeds": "general", "prefix_tokens": 8}
    place.write_plan(
        corpora={"general": "general", "legal": chosen, "written": written},
        compress=[{"method": "wanda", "sparsity": 0.5, "mixture": {"legal": 0.5, "written": 0.5}}],
        calibration={"windows": 64, "length": 32, "held_out_windows": 4, "sufficiency": True},
        evaluate={"windows": 4},
    )
    done = crosscal("enough", str(place.plan), "--home", str(place.home), "--json")
    assert done.code == 0, done.err
    asked = [(curve["corpus"], curve["points"]) for curve in json.loads(done.out)]
    assert asked == [(curve["corpus"], curve["points"]) for curve in place.run()["sufficiency"]]


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ({"legal": {"path": "x", "select": {**CHOSEN, "towards": "self"}}, "self": "self"}, "no corpus of documents"),
        ({"legal": {"path": "x", "select": {**CHOSEN, "towards": "legal"}}}, "no corpus of documents as they are"),
        ({"legal": {"path": "x", "select": {"method": "dsir", "documents": 3}}}, "come together"),
        ({"legal": {"path": "x", "select": {"towards": "y", "documents": 3}}}, "come together"),
        ({"legal": {"path": "x", "select": {"method": "dsir", "towards": "y"}}}, "needs `documents`"),
        ({"legal": {"path": "x", "select": {"near_duplicate": 0.8}}}, "did you mean `near_duplicates`"),
        ({"legal": {"path": "x", "select": {"near_duplicates": 0}}}, "near_duplicates"),
        ({"s": {"source": "self", "seeds": "legal"}}, "no corpus of documents"),
        (
            {"x": "x", "s": {"source": "self", "seeds": "x", "prefix_tokens": 64}},
            "prefix_tokens: 64 tokens leave",
        ),
        ({"x": "x", "s": {"source": "self", "seeds": "x", "first_tokens": ["a"]}}, "leave one of them out"),
    ],
)
def test_what_cannot_be_chosen_or_continued_is_told(corpora: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan({"model": "m", "corpora": corpora, "calibration": {"length": 64}})


def test_paths_of_samples_are_the_plans(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    corpora = {"legal": {"path": "pool", "select": {**CHOSEN, "towards": "sample"}}}
    (tmp_path / "plan.yaml").write_text(json.dumps({"model": "m", "corpora": corpora}))
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.document_corpora["legal"].select.towards == str(tmp_path / "sample")
    (tmp_path / "again.yaml").write_text(dump_plan(plan))
    assert load_plan(tmp_path / "again.yaml") == plan
