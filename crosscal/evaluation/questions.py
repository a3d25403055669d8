"""Question tasks: local ones, scored here, and lm-eval's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosscal.evaluation.batches import read_each
from crosscal.evaluation.harness import NamedTask, measure_named, named_tasks, text_task
from crosscal.evaluation.measurement import Measurement
from crosscal.evaluation.question_files import is_question_file, read_questions, task_names
from crosscal.evaluation.summarise import SummaryTask, measure_summaries
from crosscal.evaluation.tasks import LocalTask, Task, TextTask


@dataclass(frozen=True)
class QuestionSuite:
    """Tasks that are read and checked once, then measured on any number of models."""

    local: tuple[LocalTask, ...]
    named: tuple[NamedTask, ...]
    skipped: tuple[Measurement, ...]
    """A row for each lm-eval task that is not available here, with the reason."""
    limit: int | None = None
    """Maximum number of questions of each lm-eval task."""
    summaries: tuple[SummaryTask, ...] = ()

    @property
    def told(self) -> list[str]:
        """How local questions were read: one sentence for each task that has one."""
        return [f"{task.name}: {task.told}" for task in self.local if task.told]

    @classmethod
    def load(cls, tasks: Sequence[Task], *, limit: int | None = None) -> QuestionSuite:
        """Load local tasks, local question files (see `question_files`) and lm-eval tasks by name; `limit` bounds the
        questions of each task of the last two kinds (None: all).

        Raises `EvaluationError` for a damaged file or an unknown name; a task whose data cannot be reached is kept as
        skipped.
        """
        files = task_names([task for task in tasks if isinstance(task, str) and is_question_file(task)])
        local = [task for task in tasks if isinstance(task, LocalTask)]
        local += [LocalTask(name, tuple(read_questions(path)[:limit])) for path, name in files.items()]
        texts = [text_task(task) for task in tasks if isinstance(task, TextTask)]
        named, skipped = named_tasks([task for task in tasks if isinstance(task, str) and not is_question_file(task)])
        summaries = tuple(task for task in tasks if isinstance(task, SummaryTask))
        return cls(tuple(local), (*texts, *named), tuple(skipped), limit, summaries)

    def measure(
        self, model: Any, tokenizer: Any, *, max_length: int, batch_tokens: int = 4096, device: str = "cpu"
    ) -> list[Measurement]:
        """Measure every metric of every task on one model, which is on `device`; local questions first.

        `max_length`: the model's window in tokens. `batch_tokens`: most tokens of a batch.
        """
        asked = [task.choices(tokenizer, max_length) for task in self.local]
        answered = read_each(model, asked, device=device, batch_tokens=batch_tokens)
        found = [one for choices, answers in zip(asked, answered, strict=True) for one in choices.result(*answers)]
        for task in self.named:
            found += measure_named(task, model, tokenizer, limit=self.limit, max_length=max_length)
        for task in self.summaries:
            found += measure_summaries(task, model, tokenizer, max_length=max_length, batch_tokens=batch_tokens)
        return [*found, *self.skipped]
