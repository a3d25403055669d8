"""Measure one model, dense or compressed, once: stored measurements of the same weights and windows are reused."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from crosscal.calibration import tokenizer_digest
from crosscal.calibration.tokens import begin_token
from crosscal.corpora import Corpus
from crosscal.evaluation import TEST, Measurement, QuestionSuite
from crosscal.evaluation.batches import read_each
from crosscal.evaluation.choices import Choices
from crosscal.evaluation.harness import NamedTask, measure_named
from crosscal.evaluation.likelihood import Windows
from crosscal.evaluation.summarise import SummaryTask, measure_summaries
from crosscal.evaluation.tasks import LocalTask, Task
from crosscal.models.adapter import adapter_files
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.progress import Progress, Report, silent
from crosscal.stages.by_blocks import texts_read
from crosscal.stages.heldout_text import HeldOutText, WindowCutting, heldout_texts
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.keys import canonical_json

FORMAT = 3  # of stored measurements; since 3 one artifact per text and task, with each question's result
KIND, PLACE = "evaluations", "measurements.json"
QUESTION_TOKENS = 2048
"""Maximum length for models that state none."""
Subject = HeldOutText | LocalTask | NamedTask | SummaryTask
"""What is measured and stored separately."""
ProgressOf = Callable[[Subject], Progress]
"""Subject -> the callback for its progress."""


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """What every model of a run is measured on, and how."""

    store: Store
    texts: tuple[HeldOutText, ...]
    notes: tuple[str, ...]
    """Sentences that state what is not measured, and why."""
    begin: bool | None
    """Whether texts begin with beginning-of-text; None: the tokenizer's default."""
    max_length: int
    """Maximum tokens of a question with its answer."""
    tokenizer_digest: str
    tokenizer: PreTrainedTokenizerBase
    suite: QuestionSuite
    batch_tokens: int
    device: str
    dtype: torch.dtype
    by_blocks: bool = False
    """Models do not fit in memory: if only texts are missing, hold the weights of one block at a time."""

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All texts and tasks that can be measured, in the order of the rows."""
        return (*self.texts, *self.suite.local, *self.suite.named, *self.suite.summaries)

    def find(self, weights: str) -> list[Measurement] | None:
        """Return the stored measurements of these weights; None if any is missing."""
        found = [self.stored(weights, subject) for subject in self.subjects]
        return None if any(one is None for one in found) else self.in_all(one for one in found if one is not None)

    def in_all(self, measured: Iterable[list[Measurement]]) -> list[Measurement]:
        """Flatten, and add a row for each unreachable task."""
        return [*(one for each in measured for one in each), *self.suite.skipped]

    def stored(self, weights: str, subject: Subject) -> list[Measurement] | None:
        artifact = self.store.find(KIND, self.key(weights, subject))
        if artifact is None:
            return None
        stored = json.loads(self.store.read_bytes(artifact, PLACE))
        return [self._named(Measurement.from_json(value), subject) for value in stored]

    def measured(
        self, weights: str, model: Any, missing: Sequence[Subject], told: ProgressOf, spent: float = 0.0
    ) -> Iterator[list[Measurement]]:
        """Measure the `missing` subjects of a model that is on the device; store and yield each as soon as it is done.
        `spent`: seconds already spent on the texts, distributed over them by tokens."""
        apart = [subject for subject in missing if not isinstance(subject, NamedTask | SummaryTask)]
        read = [self._readable[subject] for subject in apart]
        progress = [told(subject) for subject in apart]
        sizes = {"device": self.device, "batch_tokens": self.batch_tokens, "progress": progress}
        tokens = [one.items * len(one.longest) for one in read]
        for number, (answers, seconds) in enumerate(read_each(model, read, **sizes)):
            seconds += spent * tokens[number] / sum(tokens)
            yield self.keep(weights, apart[number], read[number].result(answers, seconds))
        for task in self.suite.named:
            if task in missing:
                sizes = {"limit": self.suite.limit, "max_length": self.max_length}
                found = measure_named(task, model, self.tokenizer, **sizes, progress=told(task))
                yield self.keep(weights, task, found)
        for task in self.suite.summaries:
            if task in missing:
                sizes = {"max_length": self.max_length, "batch_tokens": self.batch_tokens}
                found = measure_summaries(task, model, self.tokenizer, **sizes, progress=told(task))
                yield self.keep(weights, task, found)

    def key(self, weights: str, subject: Subject) -> str:
        """Digest of the weights and of all that the numbers depend on; a plan's names are left out."""
        return digest_of([FORMAT, weights, str(self.dtype), self._identities[subject]])

    def keep(self, weights: str, subject: Subject, measured: Sequence[Measurement]) -> list[Measurement]:
        """Store the measurements of a subject; return them under this plan's names."""
        with self.store.publish(KIND, self.key(weights, subject), {"weights": weights}) as staged:
            (staged / PLACE).write_bytes(canonical_json([dataclasses.asdict(value) for value in measured]))
        return [self._named(one, subject) for one in measured]

    def _named(self, found: Measurement, subject: Subject) -> Measurement:
        """Use this plan's names and record whether the text began with beginning-of-text; questions are always encoded
        with the tokenizer's default. Of lm-eval's tasks, earlier versions stored lm-eval's own name of the split."""
        if isinstance(subject, HeldOutText):
            begins = self._begins[self.begin]
            return dataclasses.replace(found, corpus_or_task=subject.corpus, split=subject.split, begin_token=begins)
        name = found.corpus_or_task if isinstance(subject, NamedTask) and subject.texts is None else subject.name
        split = subject.split if isinstance(subject, LocalTask) else TEST
        return dataclasses.replace(found, corpus_or_task=name, split=split, begin_token=self._begins[None])

    @functools.cached_property
    def _begins(self) -> dict[bool | None, bool]:
        return {wanted: begin_token(self.tokenizer, wanted) is not None for wanted in (None, self.begin)}

    @functools.cached_property
    def _readable(self) -> dict[Subject, Windows | Choices]:
        """Texts and questions as tokens, prepared once for all models."""
        found: dict[Subject, Windows | Choices] = {}
        found |= {text: Windows(text.corpus, text.split, text.tokens_SL) for text in self.texts}
        return found | {task: task.choices(self.tokenizer, self.max_length) for task in self.suite.local}

    @functools.cached_property
    def _identities(self) -> dict[Subject, list[Any]]:
        encoding = [self.max_length, self.tokenizer_digest]
        local: dict[Subject, list[Any]] = {task: [task.digest] for task in (*self.suite.local, *self.suite.summaries)}
        version = importlib.metadata.version("lm-eval")
        named: dict[Subject, list[Any]] = {
            task: [*task.identity(self.suite.limit), version] for task in self.suite.named
        }
        texts: dict[Subject, list[Any]] = {text: [text.digest] for text in self.texts}
        return texts | {task: [*each, *encoding] for task, each in (local | named).items()}


def evaluation_set(
    store: Store,
    corpora: Sequence[Corpus],
    source: ModelSource,
    cutting: WindowCutting,
    *,
    tasks: Sequence[Task],
    limit: int | None,
    batch_tokens: int,
    device: str,
    dtype: torch.dtype,
    by_blocks: bool = False,
    report: Report = silent,
) -> EvaluationSet:
    """Cut the windows and load the tasks, once for all models of a run."""
    texts, notes = heldout_texts(store, corpora, source, cutting, report)
    return EvaluationSet(
        store,
        texts,
        notes,
        cutting.begin,
        source.max_positions or QUESTION_TOKENS,
        tokenizer_digest(source.path),
        source.tokenizer(),
        QuestionSuite.load(tasks, limit=limit),
        batch_tokens,
        device,
        dtype,
        by_blocks,
    )


def checkpoint_files(folder: Path, name: str = "model", report: Report = silent) -> dict[str, str]:
    """Return name → digest of a checkpoint's config and every weight file, including those of its adapter."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *adapter_files(folder)]
    total_bytes, done_bytes, digests = sum(file.stat().st_size for file in files), 0, {}
    for file in files:
        report(f"{name}: bytes hashed", done_bytes, total_bytes)
        digests[file.relative_to(folder).as_posix()] = digest_file(file)
        done_bytes += file.stat().st_size
    return digests


def weights_digest(files: Mapping[str, str]) -> str:
    """Return the digest of a checkpoint's config and weights, the key of its measurements."""
    return digest_of([[name, digest] for name, digest in files.items()])


def measure(
    eval_set: EvaluationSet,
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    name: str = "model",
    report: Report = silent,
) -> list[Measurement]:
    """Return every measurement of one model folder; each text's and task's is stored as soon as it is done. An
    unreachable task is not stored: it may be reachable next time.

    `files`: the result of `checkpoint_files`, if known. `report` receives the progress, labelled with `name`.
    """
    weights = weights_digest(checkpoint_files(folder, name, report) if files is None else files)
    looked_up = {subject: eval_set.stored(weights, subject) for subject in eval_set.subjects}
    known = {subject: found for subject, found in looked_up.items() if found is not None}
    if missing := [subject for subject in eval_set.subjects if subject not in known]:

        def told(subject: Subject) -> Progress:
            return functools.partial(report, f"{name}: {_what(subject)}")

        report(f"{name}: loading", 0, None)
        texts = [subject for subject in missing if isinstance(subject, HeldOutText)]
        if eval_set.by_blocks and len(texts) == len(missing):
            sizes = {"device": eval_set.device, "dtype": eval_set.dtype, "batch_tokens": eval_set.batch_tokens}
            started = time.perf_counter()
            with texts_read(folder, texts, **sizes, name=name, report=report) as model:
                spent = time.perf_counter() - started
                known |= zip(missing, eval_set.measured(weights, model, missing, told, spent), strict=True)
        else:
            model = load_variant(folder, device=eval_set.device, dtype=eval_set.dtype)
            known |= zip(missing, eval_set.measured(weights, model, missing, told), strict=True)
    return eval_set.in_all(known[subject] for subject in eval_set.subjects)


def _what(subject: Subject) -> str:
    if isinstance(subject, HeldOutText):
        split = "" if subject.split == TEST else f" ({subject.split})"
        return f"windows of {subject.corpus}{split}"
    return f"{'questions' if isinstance(subject, LocalTask) else 'answers'} of {subject.name}"
