"""`crosscal plan check` reports corpora that a run could not use, as the run itself does."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosscal.corpora import ingest
from crosscal.store import Store
from tests.helpers.tiny_place import Place, check, crosscal, make_place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def ends_like_the_run(place: Place, problem: str, said_by_the_run: str) -> None:
    """Assert that `plan check` reports the problem before and after a run, and that the run ends with exit code 1."""
    assert check(place, code=1)["problems"] == [problem]
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert done.code == 1
    assert said_by_the_run in done.err
    assert problem in check(place, code=1)["problems"]


def test_a_corpus_that_the_store_should_have_and_does_not_is_a_problem(place: Place) -> None:
    place.write_plan(corpora={"general": "general", "legal": {}})
    missing = "legal: no such corpus in the store. `crosscal ingest PATH --corpus legal`."
    ends_like_the_run(place, missing, missing)
    ingest(Store(place.home), "legal", [str(place.folder / "legal")])
    assert check(place)["problems"] == []
    place.run()


ON_LEGAL = "corpora.legal: a variant is calibrated on this corpus, and it has no"
UNDIVIDED = "which puts every document there). Leave `split` out: documents are then divided."
BOTH = "training and no validation text"
RENAME = "Add files of other names, or rename them: their documents are then divided."


@pytest.mark.parametrize(
    ("legal", "problem", "said_by_the_run"),
    [
        ({"path": "legal", "split": "test"}, f"{BOTH} (got split: test, {UNDIVIDED}", "train split does not fill"),
        (
            {"path": "legal", "split": "validation"},
            f"training text (got split: validation, {UNDIVIDED}",
            "train split does not fill",
        ),
        (
            {"path": "legal", "split": "train"},
            f"validation text (got split: train, {UNDIVIDED}",
            "validation split does not fill",
        ),
        (
            ["legal/test.jsonl", "legal/validation.jsonl"],
            f"training text (got only files or folders named test and validation). {RENAME}",
            "train split does not fill",
        ),
    ],
)
def test_a_corpus_known_to_lack_what_calibration_draws_from_is_a_problem(
    place: Place, legal: object, problem: str, said_by_the_run: str
) -> None:
    asked = {"windows": 4, "allow_leaks": True}
    place.write_plan(corpora={"general": "general", "legal": legal}, evaluate=asked)
    ends_like_the_run(place, f"{ON_LEGAL} {problem}", said_by_the_run)
    only_measured = [{"method": "sparsegpt", "sparsity": 0.5, "mixture": {"general": 1.0}}]
    place.write_plan(corpora={"general": "general", "legal": legal}, evaluate=asked, compress=only_measured)
    assert check(place)["problems"] == []


def test_a_corpus_in_the_store_without_training_text_is_a_problem(place: Place) -> None:
    place.write_plan(corpora={"general": "general", "legal": {}}, evaluate={"windows": 4, "allow_leaks": True})
    ingest(Store(place.home), "legal", [str(place.folder / "legal" / "validation.jsonl")])
    got = "(got 0 train documents, 20 validation documents, 0 test documents). Ingest more: three or more are divided."
    ends_like_the_run(place, f"{ON_LEGAL} training text {got}", "train split does not fill")


def test_documents_that_the_model_continues_are_calibration_text(place: Place) -> None:
    corpora = {
        "general": "general",
        "legal": {"path": "legal", "split": "test"},
        "own": {"source": "self", "seeds": "legal", "prefix_tokens": 8},
    }
    own = [{"method": "sparsegpt", "sparsity": 0.5, "mixture": {"own": 1.0}}]
    place.write_plan(corpora=corpora, compress=own)
    ends_like_the_run(place, f"{ON_LEGAL} {BOTH} (got split: test, {UNDIVIDED}", "no train document")


def test_documents_chosen_towards_a_sample_are_held_out_from_the_sample(place: Place) -> None:
    chosen = {"method": "dsir", "towards": "general", "documents": 40, "least_words": 1}
    legal = {"path": "legal", "split": "train", "select": chosen}
    place.write_plan(corpora={"general": "general", "legal": legal})
    assert check(place)["problems"] == []
    place.run()
    place.write_plan(corpora={"general": "general", "legal": {**legal, "split": "test"}})
    assert any(problem.startswith(f"{ON_LEGAL} training text") for problem in check(place, code=1)["problems"])
