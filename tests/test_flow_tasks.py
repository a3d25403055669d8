"""Tasks of every kind in one plan, from its YAML to the rows of a run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from crosscal.errors import CrosscalError
from crosscal.evaluation.faithfulness import risk_ratio
from crosscal.evaluation.mcnemar import change
from crosscal.evaluation.tasks import LocalTask
from crosscal.plan import load_plan
from crosscal.report.rows import DocumentRow, QuestionRow, ResultRow, read_rows
from crosscal.tasks.questions import ready_tasks
from tests.helpers.tiny_judge import tiny_judge
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_text import SENTENCES

EXAM = [
    {"question": f"{sentence} Is it so?", "opa": "yes", "opb": "no", "cop": number % 2 + 1, "exp": "why"}
    for number, sentence in enumerate(SENTENCES)
]
STUDIES = [
    {"question": "Is it so?", "contexts": [sentence, "It rains."], "final_decision": ("yes", "no", "maybe")[number % 3]}
    for number, sentence in enumerate(SENTENCES)
]
OURS = {"question": "Is it so?", "choices": ["yes", "no"], "answer": 1, "context": "It rains."}
TASKS: list[Any] = [
    "exam.jsonl",
    {"file": "exam.jsonl", "name": "short", "limit": 2, "fields": {"choices": ["{opb}!", "{opa}!"]}},
    {"file": "studies.json", "versions": ["closed", "in_context"]},
    {"continuation": "legal", "questions": 12, "words": 4, "context_words": 8, "splits": ["validation", "test"]},
    {"perplexity": "exam.jsonl", "text": "question", "name": "asked"},
    {"summaries": "papers.jsonl", "document": "text", "reference": "short", "new_tokens": 8, "judge": "judge"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("place"))
    (place.folder / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAM))
    (place.folder / "studies.json").write_text(json.dumps(STUDIES))
    (place.folder / "whole.jsonl").write_text(json.dumps(OURS | {"question": "It rains. Is it so?"}) + "\n")
    papers = [{"text": f"{one} {two}", "short": two} for one, two in itertools.pairwise(SENTENCES)]
    (place.folder / "papers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in papers))
    tiny_judge(place.folder / "judge")
    (place.folder / "ours.jsonl").write_text(json.dumps(OURS) + "\n")
    place.write_plan(evaluate={"windows": 4, "tasks": TASKS})
    return place


@pytest.fixture(scope="module")
def record(place: Place) -> dict[str, Any]:
    return place.run()


def test_every_task_has_its_rows_and_says_as_what_it_was_read(place: Place, record: dict[str, Any]) -> None:
    rows = [row for row in read_rows(place.run_dir / "results.jsonl", ResultRow) if row.metric != "perplexity"]
    accuracies = ("acc", "acc_norm")
    assert {(row.corpus_or_task, row.split, row.metric) for row in rows if row.variant == "dense"} == {
        *(("exam", "test", metric) for metric in accuracies),
        *(("short", "test", metric) for metric in accuracies),
        *((f"studies-{version}", "test", metric) for version in ("closed", "in_context") for metric in accuracies),
        *(("legal-continuation", split, metric) for split in ("validation", "test") for metric in accuracies),
        *(
            ("papers", "test", f"{which}{name}")
            for which in ("", "overlap_")
            for name in ("rouge1", "rouge2", "rougeL")
        ),
        ("papers", "test", "faithfulness"),
        *(("asked", "test", metric) for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    }
    assert all(row.value is not None for row in rows)
    said = "\n".join(record["notes"])
    assert "exam: question from question, choices from opa, opb, answer from cop by its number from 1" in said
    assert "short: question from question, choices from {opb}!, {opa}!, answer from cop by its number from 1" in said
    assert "studies-closed: question from question, choices are the words yes, no, maybe" in said
    assert "legal-continuation: 12 questions from validation documents" in said


def test_each_accuracy_says_what_changed_of_the_dense_models_answers(place: Place, record: dict[str, Any]) -> None:
    asked = read_rows(place.run_dir / "questions.jsonl", QuestionRow)
    correct = {(row.variant, row.task, row.split, row.metric): row.correct for row in asked}
    rows = read_rows(place.run_dir / "results.jsonl", ResultRow)
    for row in rows:
        ours = (row.corpus_or_task, row.split, row.metric)
        if row.variant == "dense" or ("dense", *ours) not in correct:
            assert (row.lost, row.won, row.p) == (None, None, None)
        else:
            found = change(correct["dense", *ours], correct[row.variant, *ours])
            assert (row.lost, row.won, row.p) == (found.lost, found.won, found.p)
    assert any(row.lost is not None for row in rows)
    assert "Question by question" in (place.run_dir / "report.html").read_text(encoding="utf-8")


def test_summaries_have_their_scores_and_the_ratio_of_risks(place: Place, record: dict[str, Any]) -> None:
    scores = {(r.variant, r.metric): r.score for r in read_rows(place.run_dir / "summaries.jsonl", DocumentRow)}
    rows = [r for r in read_rows(place.run_dir / "results.jsonl", ResultRow) if r.corpus_or_task == "papers"]
    for row in rows:
        if row.metric == "risk_ratio":
            wanted = risk_ratio(scores["dense", "faithfulness"], scores[row.variant, "faithfulness"])
            assert row.value == pytest.approx(wanted)
        else:
            assert row.value == pytest.approx(sum(scores[row.variant, row.metric]) / 4, abs=1e-6)
    compressed = {row.variant for row in rows} - {"dense"}
    assert {row.variant for row in rows if row.metric == "risk_ratio"} == compressed != set()
    page = (place.run_dir / "report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("papers risk ratio", "papers overlap rougeL", "papers faithfulness"))


def test_no_scores_stay_of_tasks_that_a_plan_no_longer_has(place: Place, record: dict[str, Any]) -> None:
    again = shutil.copytree(place.run_dir, place.folder / "again")
    place.run("--out", str(again), "--set", "evaluate.tasks=[]")
    assert not (again / "summaries.jsonl").exists()
    assert not read_rows(again / "questions.jsonl", QuestionRow)


def test_a_check_says_the_same_before(place: Place) -> None:
    found = json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)
    assert [(one["task"], one["questions"]) for one in found["questions"]] == [
        ("exam", 5), ("short", 2), ("studies-closed", 5), ("studies-in_context", 5),
    ]  # fmt: skip
    assert found["problems"] == []


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"file": "exam.jsonl", "fields": {"answer": "key"}}], "line 1: no field key"),
        ([{"file": "exam.jsonl", "versions": ["closed"]}], "questions without a context have one version"),
        ([{"file": "whole.jsonl", "versions": ["closed"]}], "questions that hold their context have one version"),
        ([{"file": "nowhere.csv"}], "the questions cannot be read"),
        ([{"perplexity": "exam.jsonl"}], "line 1: text is not a text"),
        (["exam.jsonl", {"file": "studies.json", "name": "exam"}], "two tasks of one name .got exam"),
        ([{"continuation": "legal"}, {"file": "exam.jsonl", "name": "legal-continuation"}], "two tasks of one name"),
    ],
)
def test_what_cannot_be_asked_is_refused(place: Place, tasks: list[Any], message: str) -> None:
    plan = load_plan(place.plan, (f"evaluate.tasks={json.dumps(tasks)}",))
    with pytest.raises(CrosscalError, match=message):
        ready_tasks(plan)


def test_a_context_stands_in_front_where_the_question_lacks_it(place: Place) -> None:
    """In crosscal's own form, the field `context` is ignored unless the plan asks for it."""
    tasks: list[Any] = ["ours.jsonl", "whole.jsonl", "studies.json"]
    tasks += [{"file": "ours.jsonl", "name": "said", "fields": {"context": "context"}}]
    tasks += [{"file": "ours.jsonl", "name": "both", "versions": ["in_context", "closed"]}]
    plan = load_plan(place.plan, (f"evaluate.tasks={json.dumps(tasks)}",))
    asked = {task.name: task.questions[0].question for task in ready_tasks(plan) if isinstance(task, LocalTask)}
    assert asked == {
        "ours": "Is it so?",
        "whole": "It rains. Is it so?",
        "studies": f"{SENTENCES[0]}\nIt rains.\n\nIs it so?",
        "said": "It rains.\n\nIs it so?",
        "both-in_context": "It rains.\n\nIs it so?",
        "both-closed": "Is it so?",
    }


def test_unreadable_task_is_reported_by_plan_check_and_before_a_run(place: Place, tmp_path: Path) -> None:
    change = ("--home", str(place.home), "--set", "evaluate.tasks=[nowhere.csv]")
    checked = crosscal("plan", "check", str(place.plan), "--json", *change)
    assert "nowhere.csv: the questions cannot be read" in " ".join(json.loads(checked.out)["problems"])
    done = crosscal("run", str(place.plan), "--out", str(tmp_path / "run"), *change)
    assert "nowhere.csv: the questions cannot be read" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_one_model_is_measured_on_the_same_tasks(place: Place, record: dict[str, Any]) -> None:
    ours = crosscal(
        "evaluate", str(place.folder / "model"), "--plan", str(place.plan), "--home", str(place.home), "--json"
    )
    found = {(row["corpus_or_task"], row["split"], row["metric"]): row["value"] for row in json.loads(ours.out)}
    rows = read_rows(place.run_dir / "results.jsonl", ResultRow)
    assert found == {(r.corpus_or_task, r.split, r.metric): r.value for r in rows if r.variant == "dense"}
