"""Tasks of lm-eval, evaluated by lm-eval itself, which is imported only if a plan names such a task."""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.evaluation.in_memory import leaves_of
from crosscal.evaluation.logits import rows_at_once
from crosscal.evaluation.measurement import TEST, Measurement
from crosscal.evaluation.question_files import FORMS
from crosscal.evaluation.tasks import TextTask
from crosscal.progress import Progress

_log = logging.getLogger(__name__)
MOST_QUESTIONS = 32
_ONE_AT_A_TIME = threading.RLock()  # lm-eval's logger and progress bars are process-wide
BOOTSTRAP_ITERATIONS = 1000
"""For standard errors without a closed form; with 0, lm-eval omits every standard error."""
UNREACHABLE = (OSError, ValueError, RuntimeError, ImportError)
"""Errors of lm-eval and datasets for offline or gated data, a retired script or a missing extra."""


@dataclass(frozen=True, eq=False)
class NamedTask:
    name: str
    leaves: dict[str, Any]
    """Result of `TaskManager.load`: the tasks behind one name, which may be a group."""
    texts: TextTask | None = None
    """The local texts; None for lm-eval's own tasks."""

    def identity(self, limit: int | None) -> list[Any]:
        """Return what the results depend on besides model and encoding."""
        return [self.name, limit] if self.texts is None else [self.texts.digest]


def named_tasks(names: Sequence[str]) -> tuple[list[NamedTask], list[Measurement]]:
    """Return the available tasks, and for each other one a row with the reason. Raises `EvaluationError` for unknown
    names."""
    if not names:
        return [], []  # lm-eval takes three seconds to import, and the index of its tasks ten
    with _quiet_lm_eval():
        return _builtin_tasks(names)


def text_task(texts: TextTask) -> NamedTask:
    with _quiet_lm_eval():
        return NamedTask(texts.name, leaves_of(texts), texts)


def measure_named(
    task: NamedTask,
    model: Any,
    tokenizer: Any,
    *,
    limit: int | None,
    max_length: int,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Measure every metric of a task on one model, which stays on its device, with the task's own few-shot examples.

    A prompt longer than `max_length` tokens loses its beginning; a warning in the log counts these prompts. A batch
    holds as many prompts as have room for their logits in `logits.LOGITS_BYTES`, at most `MOST_QUESTIONS`.
    """
    from lm_eval.models.huggingface import HFLM

    build: Any = HFLM  # the decorator that registers it hides its parameters from type checkers
    with _quiet_lm_eval(progress):
        lm = build(pretrained=model, tokenizer=tokenizer, max_length=max_length, **_encoding(task))
        return _measure_task(lm, task, limit if task.texts is None else None)


def _encoding(task: NamedTask) -> dict[str, bool]:
    """For texts, lm-eval prepends a token that is not predicted. If the tokenizer added its own after it, that one
    would be predicted from itself and counted. lm-eval's own tasks keep its encoding, so that results are comparable.
    """
    return {} if task.texts is None else {"add_bos_token": False}


def _builtin_tasks(names: Sequence[str]) -> tuple[list[NamedTask], list[Measurement]]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    loaded, skipped = [], []
    for name in names:
        _check_known(name, manager.task_index)
        try:
            task = NamedTask(name, dict(manager.load([name])))
        except UNREACHABLE as error:
            skipped.append(_skipped(name, manager.task_index[name].cfg, f"{type(error).__name__}: {error}"))
            continue
        if any(getattr(leaf, "UNSAFE_CODE", False) for leaf in task.leaves["tasks"].values()):
            why = "it runs code written by the model, which crosscal does not"
            skipped.append(_skipped(name, manager.task_index[name].cfg, why))
            continue
        loaded.append(task)
    return loaded, skipped


def _skipped(name: str, config: Mapping[str, Any] | None, why: str) -> Measurement:
    """The row of a task that is not measured, with its first metric, or `acc` for a group, which has none."""
    metrics = (config or {}).get("metric_list") or [{"metric": "acc"}]
    return Measurement(name, TEST, str(metrics[0]["metric"]), None, None, 0, 0.0, why)


def _check_known(name: str, known: Any) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"Did you mean {', '.join(close)}? " if close else ""
    raise EvaluationError(
        f"neither an lm-eval task nor a file of questions ({FORMS})",
        where=name,
        do=f"{hint}`lm_eval ls tasks` lists the built-in tasks.",
    )


def _measure_task(lm: Any, task: NamedTask, limit: int | None) -> list[Measurement]:
    from lm_eval.evaluator import evaluate

    started = time.perf_counter()
    lengths = _prompt_lengths(lm, task, limit)
    lm.batch_size_per_gpu = min(MOST_QUESTIONS, questions_at_once(lm, max(lengths, default=1)))
    outcome: Any = evaluate(lm, task.leaves, limit=limit, log_samples=True, bootstrap_iters=BOOTSTRAP_ITERATIONS)
    seconds = time.perf_counter() - started
    found = {name: list(_metrics(name, result)) for name, result in outcome["results"].items()}
    if found.get(task.name):  # for a tag, or a group without a mean, its tasks are reported
        found = {task.name: found[task.name]}
    return [
        Measurement(
            name,
            TEST,  # whatever lm-eval calls its split: nothing is chosen by it
            metric,
            value,
            stderr,
            sum(lengths),
            seconds,
            question_correct=_correct(outcome["samples"].get(name, []), metric),
        )
        for name, metrics in found.items()
        for metric, value, stderr in metrics
    ]


def _metrics(name: str, result: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """(metric, value, standard error) of one row of lm-eval's results: keys "metric,filter", "metric_stderr,filter"."""
    for key, value in result.items():
        metric, _, which = key.partition(",")
        if not which or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise EvaluationError("the result of a task is not finite", where=name, got=f"{metric} = {value}")
        stderr = result.get(f"{metric}_stderr,{which}")
        known = isinstance(stderr, float) and math.isfinite(stderr)  # lm-eval writes "N/A" where it has none
        yield metric if which == "none" else key, float(value), stderr if known else None


def _correct(samples: Sequence[dict[str, Any]], metric: str) -> tuple[bool, ...] | None:
    """Whether each question was answered correctly, in order; None unless every value is 0 or 1."""
    metric, _, which = metric.partition(",")
    asked = [one for one in samples if one.get("filter", "none") == (which or "none")]
    values = [one.get(metric) for one in sorted(asked, key=lambda one: one["doc_id"])]
    return tuple(value == 1 for value in values) if values and all(value in (0, 1) for value in values) else None


def questions_at_once(lm: Any, longest: int) -> int:
    """Return how many prompts of `longest` tokens have room for their logits, at least one."""
    rows = rows_at_once(lm.model.config.get_text_config().vocab_size, lm.model.dtype.itemsize)
    return max(1, rows // min(longest, lm.max_length))


def _prompt_lengths(lm: Any, task: NamedTask, limit: int | None) -> list[int]:
    """Tokens of each prompt with its answer. Warns of prompts too long for the model, raises for such an answer."""
    for leaf in task.leaves["tasks"].values():
        leaf.build_all_requests(limit=limit)
    instances = [instance for leaf in task.leaves["tasks"].values() for instance in leaf.instances]
    texts = [[part for part in instance.args if isinstance(part, str)] for instance in instances]
    lengths = [len(tokens) for tokens in lm.tokenizer(["".join(parts) for parts in texts], verbose=False)["input_ids"]]
    # A prompt with an answer is cut to one window, whose last token is only predicted.
    cut = [i for i, length in enumerate(lengths) if len(texts[i]) == 2 and length > lm.max_length + 1]
    for index in cut:
        answer = len(lm.tokenizer(texts[index][-1], verbose=False)["input_ids"])
        if answer >= lm.max_length:
            raise EvaluationError(
                "an answer is longer than the model's window",
                where=f"{task.name}, question {instances[index].doc_id}",
                got=f"{answer} tokens for a window of {lm.max_length}",
                do="Leave the question out.",
            )
    if cut:
        _log.warning(
            "%s: %d of %d prompts lose their beginning to fit %d tokens", task.name, len(cut), len(texts), lm.max_length
        )
    return lengths


def _bar(progress: Callable[[int, int], None] | None) -> Any:
    """Return a progress-bar class that draws nothing and calls `progress`, if given, with its position."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # starts no monitor thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = progress is None or kwargs.get("disable", False)
            super().__init__(*args, **kwargs)

        def display(self, *args: Any, **kwargs: Any) -> bool:
            if progress is not None and self.total:
                progress(int(self.n), int(self.total))
            return True

    return Bar


@contextmanager
def _quiet_lm_eval(progress: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Limit lm-eval's log to errors, pass its progress over answers to `progress`, turn other bars off; restore all
    afterwards. Only one thread at a time can hold this."""
    with _ONE_AT_A_TIME:
        yield from _without_log_and_bars(progress)


def _without_log_and_bars(progress: Callable[[int, int], None] | None) -> Iterator[None]:
    from tqdm import tqdm

    names = ("api.task", "api.model", "models.huggingface")
    modules = {name: importlib.import_module(f"lm_eval.{name}") for name in names}
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    for name, module in modules.items():
        module.tqdm = _bar(progress if name == "models.huggingface" else None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logger.setLevel(level)
        for module in modules.values():
            module.tqdm = tqdm  # type: ignore[attr-defined]
