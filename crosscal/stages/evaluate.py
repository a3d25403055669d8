"""Measuring one model, dense or compressed, once: what was measured on the same weights and windows is found again."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from crosscal.calibration import tokenizer_digest
from crosscal.calibration.tokens import begin_token
from crosscal.corpora import Corpus
from crosscal.evaluation import TEST, Measurement, QuestionSuite, perplexity
from crosscal.evaluation.questions import LoadedTask
from crosscal.evaluation.tasks import Task
from crosscal.models.adapter import adapter_files
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.progress import Report, silent
from crosscal.stages.heldout_text import Cutting, HeldOutText, heldout_texts
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.keys import canonical_json

FORMAT = 3  # of stored measurements: since 3 each text's and each task's by themselves, with what each question had
KIND, PLACE = "evaluations", "measurements.json"
QUESTION_TOKENS = 2048
"""For models without a longest window."""
Subject = HeldOutText | LoadedTask
"""What is measured, and kept, by itself."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What every model of a run is measured on."""

    store: Store
    texts: tuple[HeldOutText, ...]
    notes: tuple[str, ...]
    """What is not measured, and why, in sentences."""
    begin: bool | None
    """Whether they begin with beginning-of-text; None: as the tokenizer's texts do."""
    max_length: int
    """Tokens a question may have with its answer."""
    tokenizer_digest: str
    tokenizer: PreTrainedTokenizerBase
    suite: QuestionSuite
    limit: int | None
    batch_tokens: int
    device: str
    dtype: torch.dtype

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All that can be measured, in the order of the rows."""
        return (*self.texts, *self.suite.loaded)

    def find(self, weights: str) -> list[Measurement] | None:
        """What was measured on these weights before; None if anything is missing."""
        found = [self.stored(weights, subject) for subject in self.subjects]
        return None if any(one is None for one in found) else self.in_all(one for one in found if one is not None)

    def in_all(self, measured: Iterable[list[Measurement]]) -> list[Measurement]:
        """With a row for each task that cannot be had."""
        return [one for each in measured for one in each] + self.suite.unreachable

    def stored(self, weights: str, subject: Subject) -> list[Measurement] | None:
        artifact = self.store.find(KIND, self.key(weights, subject))
        if artifact is None:
            return None
        stored = json.loads(self.store.read_bytes(artifact, PLACE))
        return [self._named(Measurement.from_json(value), subject) for value in stored]

    def keep(self, weights: str, subject: Subject, measured: Sequence[Measurement]) -> None:
        with self.store.publish(KIND, self.key(weights, subject), {"weights": weights}) as staged:
            (staged / PLACE).write_bytes(canonical_json([dataclasses.asdict(value) for value in measured]))

    def key(self, weights: str, subject: Subject) -> str:
        """Digest of the weights and of all that the numbers depend on; not of what a plan calls it."""
        if isinstance(subject, HeldOutText):
            return digest_of([FORMAT, weights, str(self.dtype), subject.digest])
        limit = self.limit if subject.asked is None else None  # questions of this machine are cut already
        about = [limit, self.max_length, self.tokenizer_digest, importlib.metadata.version("lm-eval")]
        return digest_of([FORMAT, weights, str(self.dtype), subject.identity, about])

    def measured(self, model: Any, subject: Subject, name: str, report: Report) -> list[Measurement]:
        """One text or task on a model, which is on the device."""
        if isinstance(subject, LoadedTask):

            def answered(task: str, done: int, total: int) -> None:
                report(f"{name}: answers of {task}", done, total)

            found = self.suite.measure_one(
                subject, model, self.tokenizer, max_length=self.max_length, progress=answered
            )
        else:
            where = subject.corpus if subject.split == TEST else f"{subject.corpus} ({subject.split})"
            found = [
                perplexity(
                    model,
                    subject.tokens_SL,
                    name=subject.corpus,
                    split=subject.split,
                    device=self.device,
                    batch_tokens=self.batch_tokens,
                    progress=functools.partial(report, f"{name}: windows of {where}"),
                )
            ]
        return [self._named(one, subject) for one in found]

    def _named(self, found: Measurement, subject: Subject) -> Measurement:
        """As this plan calls it, with what the text began with: questions are always encoded as the tokenizer does by
        default."""
        if isinstance(subject, LoadedTask):
            told = {} if subject.asked is None else {"corpus_or_task": subject.name, "split": subject.split}
            return dataclasses.replace(found, begin_token=self._begins[None], **told)
        return dataclasses.replace(
            found, corpus_or_task=subject.corpus, split=subject.split, begin_token=self._begins[self.begin]
        )

    @functools.cached_property
    def _begins(self) -> dict[bool | None, bool]:
        return {wanted: begin_token(self.tokenizer, wanted) is not None for wanted in (None, self.begin)}


def examination(
    store: Store,
    corpora: Sequence[Corpus],
    source: ModelSource,
    cutting: Cutting,
    *,
    tasks: Sequence[Task],
    limit: int | None,
    batch_tokens: int,
    device: str,
    dtype: torch.dtype,
    report: Report = silent,
) -> Examination:
    """Cut the windows and load the tasks, once for all models of a run."""
    texts, notes = heldout_texts(store, corpora, source, cutting, report)
    return Examination(
        store,
        texts,
        notes,
        cutting.begin,
        source.max_positions or QUESTION_TOKENS,
        tokenizer_digest(source.path),
        source.tokenizer(),
        QuestionSuite.load(tasks, limit=limit),
        limit,
        batch_tokens,
        device,
        dtype,
    )


def checkpoint_files(folder: Path, name: str = "model", report: Report = silent) -> dict[str, str]:
    """Name → digest of a checkpoint's config and every file of weights, its adapter's included."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *adapter_files(folder)]
    total_bytes, done_bytes, digests = sum(file.stat().st_size for file in files), 0, {}
    for file in files:
        report(f"{name}: bytes hashed", done_bytes, total_bytes)
        digests[file.relative_to(folder).as_posix()] = digest_file(file)
        done_bytes += file.stat().st_size
    return digests


def weights_digest(files: Mapping[str, str]) -> str:
    """Of a checkpoint's config and weights together: what its measurements are kept under."""
    return digest_of([[name, digest] for name, digest in files.items()])


def measure(
    exam: Examination,
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    name: str = "model",
    report: Report = silent,
) -> list[Measurement]:
    """Every measurement of one model folder, each text's and task's kept as soon as it is there. That a task was out of
    reach is not kept: it may be reachable next time.

    `files`: what `checkpoint_files` gives, if it is at hand. `report` is told how far it is, of a model called `name`.
    """
    weights = weights_digest(checkpoint_files(folder, name, report) if files is None else files)
    looked_up = {subject: exam.stored(weights, subject) for subject in exam.subjects}
    known = {subject: found for subject, found in looked_up.items() if found is not None}
    if missing := [subject for subject in exam.subjects if subject not in known]:
        report(f"{name}: loading", 0, None)
        model = load_variant(folder, device=exam.device, dtype=exam.dtype)
        for subject in missing:
            known[subject] = exam.measured(model, subject, name, report)
            exam.keep(weights, subject, known[subject])
    return exam.in_all(known[subject] for subject in exam.subjects)
