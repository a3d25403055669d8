"""A leak ends a run before any calibration pass, is reported by `plan check`, and can be allowed by name; clean text is
described in the record and the report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from crosscal.calibration.overlap import DocumentOverlap, SetOverlap
from crosscal.stages.leaks import leak
from tests.helpers.tiny_place import Place, crosscal, make_place

WORDS = [f"{first}{second}" for first in ("ba", "di", "ko", "lu") for second in ("ra", "ne", "mi", "so", "tu")]
WORST = (DocumentOverlap(0, 0.9, "a", "forms", "b"),)
SPLITS = {"train": 30, "validation": 8, "test": 8}


def texts(corpus: str, split: str, count: int) -> list[str]:
    chance = random.Random(f"{corpus} {split}")
    return [" ".join(chance.choices(WORDS, k=60)) for _ in range(count)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for corpus in ("general", "legal"):
        for split, count in SPLITS.items():
            write(place.folder / corpus / f"{split}.jsonl", texts(corpus, split, count))
    return place


def write(file: Path, documents: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def plant(place: Place) -> str:
    """Add a legal test document, in capitals and with punctuation, to the general training text; return it."""
    leaked = texts("legal", "test", SPLITS["test"])[3]
    written = ". ".join(leaked.upper().split(" ", 9))
    write(place.folder / "general" / "train.jsonl", [*texts("general", "train", SPLITS["train"]), written])
    return written


def check(place: Place) -> tuple[int, dict]:
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json")
    return done.code, json.loads(done.out)


def test_a_leak_ends_a_run_unless_the_plan_allows_it(place: Place) -> None:
    written = plant(place)
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    for said in ("legal (test): 1 of 8 texts", "100%", written[:30], "in general's", "evaluate.allow_leaks"):
        assert said in done.err
    assert not (place.home / "objects" / "moments").exists(), "before the model reads anything"
    code, found = check(place)
    assert code == 1
    assert any("legal (test): 1 of 8 texts" in problem for problem in found["problems"])
    place.write_plan(evaluate={"windows": 4, "allow_leaks": ["general"]})
    assert check(place)[0] == 1, "another set is allowed"
    place.write_plan(evaluate={"windows": 4, "allow_leaks": ["legal"]})
    record = place.run()
    leaked = {each["set"]: each["leaked"] for each in record["overlap"]["sets"]}
    assert leaked == {
        f"{c} ({s})": int(c + s == "legaltest") for c in ("general", "legal") for s in ("validation", "test")
    }
    assert "legal (test): 1 of 8 texts occur in the calibration text" in (place.run_dir / "report.html").read_text()
    assert len(list((place.home / "objects" / "overlaps").iterdir())) == 1, "compared once"
    assert check(place)[1]["problems"] == []


def test_the_beginnings_that_the_model_continues_are_calibration_text(place: Place) -> None:
    plant(place)
    seeded = {"source": "self", "seeds": "general", "prefix_tokens": 8}
    place.write_plan(
        corpora={"general": "general", "legal": "legal", "seeded": seeded},
        compress=[{"method": "sparsegpt", "sparsity": 0.5, "mixture": {"seeded": 1.0}}],
    )
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    assert "legal (test): 1 of 8 texts" in done.err


def test_near_copies_are_no_leak_where_training_documents_are_near_copies_as_often() -> None:
    def sets(leaked: int, of_training: int) -> list[SetOverlap]:
        training = SetOverlap("forms (train)", documents=200, leaked=of_training)
        return [SetOverlap("forms (test)", documents=100, leaked=leaked, largest=WORST), training]

    for of_training, most in ((0, 0), (2, 4), (20, 19), (200, 100)):
        stopped = [leaked for leaked in range(101) if leak(sets(leaked, of_training), False)]
        assert stopped == list(range(most + 1, 101)), "from three standard deviations above the expected number on"
    asked = SetOverlap("exam", documents=100, leaked=1, largest=WORST)
    assert leak([asked, *sets(0, 20)], False), "questions are to be nowhere"
    assert leak([asked], ["exam"]) is None


def test_questions_are_compared_with_their_right_answers(place: Place) -> None:
    passage = texts("legal", "train", SPLITS["train"])[5].split()
    question, answer = " ".join(passage[5:45]), " ".join(passage[45:50])
    rows = [
        {"question": question, "choices": ["never", answer], "answer": 1},
        {"question": " ".join(passage[5:17]), "choices": ["yes", "no"], "answer": 0},
        {"question": "too short", "choices": ["yes", "no"], "answer": 0},
    ]
    (place.folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place.write_plan(evaluate={"windows": 4, "tasks": ["exam.jsonl"]})
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    assert "exam: 1 of 3 texts" in done.err


def test_a_clean_run_says_what_its_text_is_like_and_whether_there_is_enough(place: Place) -> None:
    calibration = {"windows": 16, "length": 32, "held_out_windows": 4, "sufficiency": True}
    place.write_plan(calibration=calibration)
    record = place.run()
    assert {each["leaked"] for each in record["overlap"]["sets"]} == {0}
    page = (place.run_dir / "report.html").read_text()
    for corpus in ("general", "legal"):
        assert record["calibration_quality"][corpus]["tokens"] == 16 * 32
        assert f"<td>{corpus}</td>" in page
    assert [curve["corpus"] for curve in record["sufficiency"]] == ["general", "legal"]
    assert all(
        f"{curve['corpus']}: {curve['verdict']}; the last doubling, to 512 tokens" in page
        for curve in record["sufficiency"]
    )
    asked = crosscal("enough", str(place.plan), "--home", str(place.home), "--json")
    assert [curve["points"] for curve in json.loads(asked.out)] == [curve["points"] for curve in record["sufficiency"]]
    before, after = check(place)[1]["calibration_quality"]["legal"], record["calibration_quality"]["legal"]
    assert before | {"faults": []} == {"faults": []} | {name: after[name] for name in before if name != "faults"}
    assert after["perplexity"] > 1
    assert after["held_out_perplexity"] > 1
    place.write_plan(calibration={"windows": 1, "length": 32, "held_out_windows": 4})
    assert "general: 32 tokens for inputs of up to 64: their Hessians have no full rank." in check(place)[1]["warnings"]
