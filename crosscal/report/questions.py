"""Changes between two models' answers, question by question: McNemar's exact test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from crosscal.evaluation.mcnemar import change
from crosscal.evaluation.measurement import TEST
from crosscal.evaluation.tasks import CLOSED, IN_CONTEXT, version_name
from crosscal.report.groups import SeedGroup
from crosscal.report.headline import Recommendation
from crosscal.report.rows import QuestionRow

MOST_ROWS = 100
METRICS = ("acc", "exact_match")
"""Metrics that decide whether an answer is correct, in order of preference; without them, a task's first metric."""
Answers = Mapping[str, Mapping[str, Sequence[bool]]]
"""Task -> variant -> whether each question was answered correctly."""


@dataclass(frozen=True)
class AnswerChanges:
    """Rows that show how a second model's answers differ from a first one's, one column per task."""

    title: str
    tasks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """(the models, in words; one cell per task, as in "−4.2 points, 12 lost / 7 won, p = .36")."""
    left_out: int = 0


def answers_of(rows: Iterable[QuestionRow]) -> Answers:
    """Return the answers to test questions, by one metric per task; validation questions are not shown."""
    found: dict[str, dict[str, dict[str, Sequence[bool]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.split == TEST:
            found[row.task][row.metric][row.variant] = row.correct
    return {task: by_metric[_metric(by_metric)] for task, by_metric in found.items()}


def answer_changes(
    groups: Sequence[SeedGroup], best: Sequence[Recommendation], answers: Answers
) -> list[AnswerChanges]:
    """Return the tables that are not empty: every variant against the dense model; recommended variants against the
    same calibrated on general text alone; every model with contexts against itself without. Rows are in the groups'
    order."""
    dense = next((group.variants[0] for group in groups if group.is_dense), None)
    compressed = [variant for group in groups if not group.is_dense for variant in group.variants]
    against_dense = [(variant, dense, variant) for variant in compressed if dense]
    chosen = dict.fromkeys(pair for one in best for pair in _pairs(one))
    tables = [
        _table("Against the dense model", against_dense, answers),
        _table(
            "What to take, against the same calibrated on general text alone",
            [(f"{after} against {before}", before, after) for before, after in chosen],
            answers,
        ),
        _of_contexts([*([dense] if dense else []), *compressed], answers),
    ]
    return [table for table in tables if table.rows]


def _pairs(best: Recommendation) -> list[tuple[str, str]]:
    """(general-only, recommended) variants, seed by seed."""
    before = best.general_only
    if before is None or before is best.group or len(before.variants) != len(best.group.variants):
        return []
    return list(zip(before.variants, best.group.variants, strict=True))


def _table(title: str, pairs: Sequence[tuple[str, str, str]], answers: Answers) -> AnswerChanges:
    """`pairs`: (label, first, second)."""
    tasks = tuple(answers)
    rows = [
        (label, tuple(_cell(answers[task].get(first), answers[task].get(second)) for task in tasks))
        for label, first, second in pairs
    ]
    return _bounded(title, tasks, rows)


def _of_contexts(variants: Sequence[str], answers: Answers) -> AnswerChanges:
    """The effect of the context, if one task was asked in both versions."""
    asked = {task: task.removesuffix(version_name("", CLOSED)) for task in answers}
    both = {
        stem: (answers[task], answers[version_name(stem, IN_CONTEXT)])
        for task, stem in asked.items()
        if stem != task and version_name(stem, IN_CONTEXT) in answers
    }
    rows = [
        (variant, tuple(_cell(closed.get(variant), in_context.get(variant)) for closed, in_context in both.values()))
        for variant in variants
    ]
    return _bounded("With the context, against the same questions without", tuple(both), rows)


def _bounded(title: str, tasks: tuple[str, ...], rows: Sequence[tuple[str, tuple[str, ...]]]) -> AnswerChanges:
    told = [row for row in rows if set(row[1]) - {"–"}]
    return AnswerChanges(title, tasks, tuple(told[:MOST_ROWS]), max(0, len(told) - MOST_ROWS))


def _cell(first: Sequence[bool] | None, second: Sequence[bool] | None) -> str:
    if not first or not second or len(first) != len(second):
        return "–"
    return str(change(first, second))


def _metric(found: Iterable[str]) -> str:
    names = list(found)
    return next((name for name in METRICS if name in names), names[0])
