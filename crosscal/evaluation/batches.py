"""Forward passes over batches of windows and questions, by worker threads that share one model's weights.

Each worker thread processes one batch after another on one core (or a few) of its own. All threads together hold as
many tokens as one batch would, so they need no additional memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from crosscal.evaluation.logits import LogitReader, reading
from crosscal.evaluation.measurement import Measurement
from crosscal.lanes import each_side_by_side, side_by_side
from crosscal.progress import Progress

Batch = tuple[int, Callable[[], Any]]
"""(number of windows or questions, function that evaluates them)."""


class Subject(Protocol):
    """A text or task that a model is measured on, in batches."""

    @property
    def items(self) -> int:
        """Number of windows or questions."""
        ...

    @property
    def longest(self) -> Sequence[int]:
        """Token ids of the longest window, or of the longest question without its choices."""
        ...

    def check(self, model: Any) -> None:
        """Raise `EvaluationError` if the model cannot process it."""
        ...

    def batches(self, reader: LogitReader, batch_tokens: int) -> list[Batch]:
        """Return batches of at most `batch_tokens` tokens, but of at least one window or question."""
        ...

    def result(self, answers: list[Any], seconds: float) -> list[Measurement]:
        """Combine the batches' answers, which are in the order of the batches."""
        ...


def read_each(
    model: Any,
    subjects: Sequence[Subject],
    *,
    device: torch.device | str,
    batch_tokens: int,
    progress: Sequence[Progress | None] = (),
) -> Iterator[tuple[list[Any], float]]:
    """Yield (answers, seconds) of every subject, in order, for a model that is already on `device`.

    `progress`: one callback per subject for the windows or questions done. Seconds are summed over worker threads.
    """
    if not subjects:
        return
    for subject in subjects:
        subject.check(model)
    longest = max((subject.longest for subject in subjects), key=len)
    lanes = lanes_for(device, batch_tokens, len(longest))
    with reading(model, torch.tensor(longest).to(device), lanes) as reader:
        # Probes on a few tokens are too small for intra-op threads, which would only wait for each other.
        parts = [partial(subject.batches, reader, batch_tokens // lanes) for subject in subjects]
        batches = side_by_side(parts, device, most=1, threads_each=1 if lanes > 1 else None)
        jobs = [partial(_timed, run) for each in batches for _, run in each]
        answered = each_side_by_side(jobs, device, most=lanes)
        for number, subject in enumerate(subjects):
            answers, seconds, done = [], 0.0, 0
            for items, _ in batches[number]:
                answer, taken = next(answered)
                answers.append(answer)
                seconds, done = seconds + taken, done + items
                if number < len(progress) and (tell := progress[number]):
                    tell(done, subject.items)
            yield answers, seconds


def lanes_for(device: torch.device | str, batch_tokens: int, longest: int) -> int:
    """Return the number of worker threads: one per torch thread of the caller (on a GPU one in all), but at most as
    many as sequences of `longest` tokens fit in one batch."""
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    return max(1, min(threads, batch_tokens // max(1, longest)))


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    with torch.inference_mode():  # thread-local, so each job enters it
        answer = run()
    return answer, time.perf_counter() - started
