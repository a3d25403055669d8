"""Tasks in a plan: a name, a file, or a mapping; every mistake is named with its place and a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscal.errors import PlanError
from crosscal.plan import ContinuationTask, FileTask, TextTask, dump_plan, load_plan
from crosscal.plan.tasks import continued_corpora

TASKS: list[Any] = [
    "arc_easy",
    "exam.csv",
    {"file": "exam.jsonl", "fields": {"choices": ["a", "b"], "answer_is": "number_from_1"}, "versions": ["closed"]},
    {"continuation": "general", "questions": 20, "splits": ["validation", "test"]},
    {"perplexity": "papers.jsonl", "text": "body", "name": "papers"},
]


def plan_with(folder: Path, *tasks: Any) -> Path:
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "corpora": {"general": "x.txt"}, "evaluate": {"tasks": [*tasks]}}))
    return file


def test_a_task_is_a_name_a_file_or_a_mapping_and_files_belong_to_the_plans_folder(tmp_path: Path) -> None:
    plan = load_plan(plan_with(tmp_path, *TASKS))
    name, file, eval_set, continued, papers = plan.evaluate.tasks
    assert (name, file) == ("arc_easy", str(tmp_path / "exam.csv"))
    assert isinstance(eval_set, FileTask)
    assert (eval_set.file, eval_set.fields.choices) == (str(tmp_path / "exam.jsonl"), ["a", "b"])
    assert isinstance(continued, ContinuationTask)
    assert (continued.questions, continued.choices, continued_corpora(plan.evaluate.tasks)) == (20, 4, ["general"])
    assert isinstance(papers, TextTask)
    assert papers.perplexity == str(tmp_path / "papers.jsonl")


def test_a_plan_with_tasks_is_written_and_read_back(tmp_path: Path) -> None:
    plan = load_plan(plan_with(tmp_path, *TASKS))
    (tmp_path / "again.yaml").write_text(dump_plan(plan))
    assert load_plan(tmp_path / "again.yaml") == plan


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"questions": 20}, r"evaluate\.tasks\.0: a task is a name, a file of questions, or a mapping with file, "),
        (7, r"evaluate\.tasks\.0: Input should be a valid string .got 7."),
        ({"file": "x.csv", "feilds": {}}, r"evaluate\.tasks\.0\.feilds: unknown field; did you mean `fields`"),
        (
            {"file": "x.csv", "fields": {"anwser": "k"}},
            r"fields\.anwser: unknown field; did you mean `answer`",
        ),
        ({"file": "x.csv", "fields": {"answer_is": "digit"}}, r"tasks\.0\.fields\.answer_is: Input should be 'letter'"),
        ({"file": "x.csv", "versions": ["open"]}, r"tasks\.0\.versions\.0: Input should be 'closed' or 'in_context'"),
        ({"continuation": "legal"}, "evaluate.tasks: 'legal' is no corpus of documents; those are: general"),
        ({"continuation": "general", "choices": 1}, r"tasks\.0\.choices: .*greater than or equal to 2"),
        ({"perplexity": "x.jsonl", "txt": "body"}, r"tasks\.0\.txt: unknown field; did you mean `text`"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, task: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_plan(plan_with(tmp_path, task))
