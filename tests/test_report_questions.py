"""Question by question: the report compares the models that it names, by McNemar's test on the same questions."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from crosscal.evaluation.mcnemar import change
from crosscal.report import write_report
from crosscal.report.groups import groups_of
from crosscal.report.headline import best_variants
from crosscal.report.questions import MOST_ROWS, answer_changes, answers_of
from crosscal.report.rows import QuestionRow, write_rows
from tests.helpers.made_up_run import sweep, write_run

TASKS = ("facts", "exam-closed", "exam-in_context")


def asked(variants: list[str], *, metric: str = "acc", split: str = "test") -> list[QuestionRow]:
    draw = random.Random(5)
    return [
        QuestionRow(variant, task, split, metric, [draw.random() < 0.6 for _ in range(50)])
        for variant in variants
        for task in TASKS
    ]


def test_every_comparison_is_of_the_same_questions() -> None:
    results = sweep()
    groups = groups_of(results, [])
    rows = asked([variant for group in groups for variant in group.variants])
    noise = [replace(row, metric="acc_norm", correct=row.correct[::-1]) for row in rows]
    noise += [replace(row, split="validation", correct=row.correct[::-1]) for row in rows]
    by = {(row.task, row.variant): row.correct for row in rows}
    best = [one for domain in ("biomedical", "legal") for one in best_variants(groups, domain)]
    found = {one.title: one for one in answer_changes(groups, best, answers_of([*noise, *rows]))}
    against_dense, against_general, with_context = found.values()

    compressed = [variant for group in groups if not group.is_dense for variant in group.variants]
    assert against_dense.tasks == TASKS
    assert [label for label, _ in against_dense.rows] == compressed[:MOST_ROWS]
    for label, cells in against_dense.rows:
        assert cells == tuple(str(change(by[task, "dense"], by[task, label])) for task in TASKS)

    pairs = {(one.general_only.name, one.group.name) for one in best if one.general_only not in (None, one.group)}
    assert {tuple(label.split(" against ")[::-1]) for label, _ in against_general.rows} == pairs
    for label, cells in against_general.rows:
        after, before = label.split(" against ")
        assert cells == tuple(str(change(by[task, before], by[task, after])) for task in TASKS)

    assert with_context.tasks == ("exam",)
    for label, (cell,) in with_context.rows:
        assert cell == str(change(by["exam-closed", label], by["exam-in_context", label]))


def test_what_was_not_asked_of_both_is_not_compared() -> None:
    groups = groups_of(sweep(), [])
    names = [variant for group in groups for variant in group.variants]
    rows = asked(names)
    assert answer_changes(groups, [], {}) == []
    only = [row for row in rows if (row.task, row.variant) != ("facts", names[1])]
    table = answer_changes(groups, [], answers_of(only))[0]
    assert dict(table.rows)[names[1]][0] == "–"
    shorter = [replace(row, correct=row.correct[:9]) if row.variant == names[1] else row for row in rows]
    assert names[1] not in dict(answer_changes(groups, [], answers_of(shorter))[0].rows)


@pytest.mark.parametrize("with_answers", [True, False])
def test_the_page_shows_them_where_there_are_any(tmp_path: Path, with_answers: bool) -> None:
    results = sweep()
    write_run(tmp_path, results)
    if with_answers:
        write_rows(tmp_path / "questions.jsonl", asked(list(dict.fromkeys(row.variant for row in results))))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("Question by question" in page) == with_answers
    assert ("lost / " in page) == with_answers
