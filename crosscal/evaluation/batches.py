"""Batches of texts and questions, read side by side: of one model, in lanes that share its weights.

A lane reads one batch after the other with one core (or a few) to itself. Together the lanes hold as many tokens as one
batch would, so that they cost no memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from crosscal.evaluation.logits import Reader, reading
from crosscal.evaluation.measurement import Measurement
from crosscal.lanes import each_side_by_side, side_by_side
from crosscal.progress import Progress

Batch = tuple[int, Callable[[], Any]]
"""How many windows or questions, and what reads them."""


class Subject(Protocol):
    """Something that a model is measured on, in batches."""

    @property
    def items(self) -> int:
        """How many windows or questions."""
        ...

    @property
    def longest(self) -> Sequence[int]:
        """The most tokens that are read in one piece."""
        ...

    def check(self, model: Any) -> None:
        """Raises `EvaluationError` where the model cannot read it."""
        ...

    def batches(self, reader: Reader, batch_tokens: int) -> list[Batch]:
        """What is to be read, at most so many tokens at once, but one window or question at least."""
        ...

    def result(self, answers: list[Any], seconds: float) -> list[Measurement]:
        """What the batches' answers come to, in their order."""
        ...


def read_each(
    model: Any,
    subjects: Sequence[Subject],
    *,
    device: torch.device | str,
    batch_tokens: int,
    progress: Sequence[Progress | None] = (),
) -> Iterator[tuple[list[Any], float]]:
    """(answers, seconds) of every subject, in order, of a model that is on `device` already.

    `progress`: of each subject, what is told the windows or questions done. Seconds are the sum over all lanes.
    """
    if not subjects:
        return
    for subject in subjects:
        subject.check(model)
    longest = max((subject.longest for subject in subjects), key=len)
    lanes = lanes_for(device, batch_tokens, len(longest))
    with reading(model, torch.tensor(longest).to(device), lanes) as reader:
        # What is tried on a few tokens is too small to share: threads of one operation would only wait for each other.
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
    """As many as the calling thread has threads, if so many of the longest pieces make no more than a batch."""
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    return max(1, min(threads, batch_tokens // max(1, longest)))


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    with torch.inference_mode():  # it is each thread's own
        answer = run()
    return answer, time.perf_counter() - started
