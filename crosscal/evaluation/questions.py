"""What models are asked: local files of questions, scored here, and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.evaluation.batches import read_each
from crosscal.evaluation.choices import Choices
from crosscal.evaluation.encoded import encoded
from crosscal.evaluation.harness import NamedTask, measure_named, named_tasks
from crosscal.evaluation.measurement import TEST, Measurement
from crosscal.evaluation.question_files import Question, is_question_file, read_questions, task_names


@dataclass(frozen=True, eq=False)
class LocalTask:
    name: str
    path: str
    questions: tuple[Question, ...]

    def choices(self, tokenizer: Any, max_length: int) -> Choices:
        """Encoded for a model."""
        return Choices(self.name, encoded(self.questions, tokenizer, name=self.name, max_length=max_length))


@dataclass(frozen=True)
class QuestionSuite:
    """Tasks read and checked once, then measured on any number of models."""

    local: tuple[LocalTask, ...]
    named: tuple[NamedTask, ...]
    skipped: dict[str, str]
    """Tasks of lm-eval's that cannot be had here, with the reason."""
    limit: int | None = None

    @classmethod
    def load(cls, tasks: Sequence[str], *, limit: int | None = None) -> QuestionSuite:
        """Load local files of questions (see `question_files`) and lm-eval's task names, `limit` of each (None: all).

        A damaged file or an unknown name is an `EvaluationError`; a task whose data cannot be reached is kept as
        skipped.
        """
        files = [task for task in tasks if is_question_file(task)]
        local = [LocalTask(name, path, tuple(read_questions(path)[:limit])) for path, name in task_names(files).items()]
        named, skipped = named_tasks([task for task in tasks if not is_question_file(task)])
        return cls(tuple(local), tuple(named), skipped, limit)

    @property
    def unreachable(self) -> list[Measurement]:
        return [Measurement(name, TEST, "acc", None, None, 0, 0.0, why) for name, why in self.skipped.items()]

    def measure(
        self, model: Any, tokenizer: Any, *, max_length: int, batch_tokens: int = 4096, device: str = "cpu"
    ) -> list[Measurement]:
        """Every metric of every task on one model, which is on `device`; files first."""
        asked = [task.choices(tokenizer, max_length) for task in self.local]
        answered = read_each(model, asked, device=device, batch_tokens=batch_tokens)
        found = [one for choices, answers in zip(asked, answered, strict=True) for one in choices.result(*answers)]
        for task in self.named:
            found += measure_named(task, model, tokenizer, limit=self.limit, max_length=max_length)
        return found + self.unreachable
