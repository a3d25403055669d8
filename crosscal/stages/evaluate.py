"""Measuring one model, dense or compressed, once: what was measured on the same weights and windows is found again."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from crosscal.calibration import tokenizer_digest
from crosscal.calibration.tokens import begin_token
from crosscal.corpora import Corpus, documents
from crosscal.errors import TooLittleText
from crosscal.evaluation import Measurement, QuestionSuite, perplexity, windows_of
from crosscal.models.adapter import adapter_files
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.progress import Report, silent
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.keys import canonical_json

FORMAT = 2  # of stored measurements: since 2 with what each window had
QUESTION_TOKENS = 2048
"""For models without a longest window."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What every model of a run is measured on."""

    store: Store
    windows: dict[str, torch.Tensor]
    """Corpus -> test windows [S, L]."""
    begin: bool | None
    """Whether they begin with beginning-of-text; None: as the tokenizer's texts do."""
    max_length: int
    """Tokens a question may have with its answer."""
    tokenizer_digest: str
    tokenizer: PreTrainedTokenizerBase
    suite: QuestionSuite
    tasks: tuple[str, ...]
    limit: int | None
    batch_tokens: int
    device: str
    dtype: torch.dtype

    def key(self, weights: str) -> str:
        """Digest of the weights and of everything they are measured on."""
        return digest_of([FORMAT, weights, self._windows_digest, self._questions, str(self.dtype)])

    def find(self, weights: str) -> list[Measurement] | None:
        """What was measured on these weights before; None if nothing was."""
        artifact = self.store.find("evaluations", self.key(weights))
        if artifact is None:
            return None
        stored = json.loads(self.store.read_bytes(artifact, "measurements.json"))
        return [self.described(Measurement.from_json(value)) for value in stored]

    def described(self, found: Measurement) -> Measurement:
        """With what the text began with: questions are always encoded as the tokenizer does by default."""
        wanted = self.begin if found.corpus_or_task in self.windows else None
        return dataclasses.replace(found, begin_token=begin_token(self.tokenizer, wanted) is not None)

    @functools.cached_property
    def _windows_digest(self) -> str:
        return digest_of({name: tokens_SL.tolist() for name, tokens_SL in self.windows.items()})

    @functools.cached_property
    def _questions(self) -> list[Any]:
        if not self.tasks:
            return []
        tasks = [[Path(task).name, digest_file(Path(task))] if Path(task).is_file() else task for task in self.tasks]
        return [tasks, self.limit, self.max_length, self.tokenizer_digest, importlib.metadata.version("lm-eval")]


def examination(
    store: Store,
    corpora: Sequence[Corpus],
    source: ModelSource,
    *,
    length: int,
    windows: int,
    tasks: Sequence[str],
    limit: int | None,
    batch_tokens: int,
    device: str,
    dtype: torch.dtype,
    begin: bool | None = None,
    plain_text: bool = False,
    report: Report = silent,
) -> Examination:
    """Cut the test windows and load the tasks, once for all models of a run."""
    positions = source.max_positions
    cut = functools.partial(windows_for_testing, length=length, windows=windows, begin=begin, plain_text=plain_text)
    return Examination(
        store,
        {corpus.name: cut(store, corpus, source, report=report) for corpus in corpora},
        begin,
        positions or QUESTION_TOKENS,
        tokenizer_digest(source.path),
        source.tokenizer(),
        QuestionSuite.load(tasks, limit=limit),
        tuple(tasks),
        limit,
        batch_tokens,
        device,
        dtype,
    )


def windows_for_testing(
    store: Store,
    corpus: Corpus,
    source: ModelSource,
    *,
    length: int,
    windows: int,
    begin: bool | None = None,
    plain_text: bool = False,
    report: Report = silent,
) -> torch.Tensor:
    """Windows of all test documents of a corpus: int64 [S, L]. Raises `TooLittleText` naming the corpus."""
    texts = (text for shard in corpus.shards for text in documents(store, shard, "test"))
    told = _told(texts, f"{corpus.name}: reading test documents", corpus.documents("test"), report)
    length = min(length, source.max_positions or length)
    try:
        return windows_of(told, source.tokenizer(), length, windows, begin=begin, plain_text=plain_text)
    except TooLittleText as error:
        raise TooLittleText(error.what, where=f"{corpus.name}", got=error.got, do=error.do) from error


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
    """Every measurement of one model folder. With a task skipped nothing is kept: it may be reachable next time.

    `files`: what `checkpoint_files` gives, if it is at hand. `report` is told how far it is, of a model called `name`.
    """
    weights = weights_digest(checkpoint_files(folder, name, report) if files is None else files)
    known = exam.find(weights)
    if known is not None:
        return known
    report(f"{name}: loading", 0, None)
    model = load_variant(folder, device=exam.device, dtype=exam.dtype)
    found = [
        perplexity(
            model,
            tokens_SL,
            name=corpus,
            split="test",
            device=exam.device,
            batch_tokens=exam.batch_tokens,
            progress=functools.partial(report, f"{name}: windows of {corpus}"),
        )
        for corpus, tokens_SL in exam.windows.items()
    ]
    if exam.tasks:
        found += exam.suite.measure(
            model,
            exam.tokenizer,
            max_length=exam.max_length,
            progress=lambda task, done, total: report(f"{name}: answers of {task}", done, total),
        )
    if not any(value.skipped for value in found):
        with exam.store.publish("evaluations", exam.key(weights), {"weights": weights}) as staged:
            (staged / "measurements.json").write_bytes(canonical_json([dataclasses.asdict(value) for value in found]))
    return [exam.described(value) for value in found]


def _told(texts: Iterable[str], what: str, total: int, report: Report) -> Iterator[str]:
    for done, text in enumerate(texts):
        report(what, done, total)
        yield text
