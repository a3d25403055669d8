"""Measuring one model, dense or compressed, once: what was measured on the same weights and windows is found again."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from crosscal.calibration import tokenizer_digest
from crosscal.corpora import Corpus, documents
from crosscal.errors import TooLittleText
from crosscal.evaluation import Measurement, QuestionSuite, perplexity, windows_of
from crosscal.models.checkpoint import load_variant
from crosscal.models.source import ModelSource
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.keys import canonical_json

FORMAT = 1
QUESTION_BATCH = 32
QUESTION_TOKENS = 2048
"""For models without a longest window."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What every model of a run is measured on."""

    store: Store
    windows: dict[str, torch.Tensor]
    """Corpus -> test windows [S, L]."""
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
) -> Examination:
    """Cut the test windows and load the tasks, once for all models of a run."""
    positions = source.max_positions

    return Examination(
        store,
        {corpus.name: test_windows(store, corpus, source, length=length, windows=windows) for corpus in corpora},
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


def test_windows(store: Store, corpus: Corpus, source: ModelSource, *, length: int, windows: int) -> torch.Tensor:
    """Windows of all test documents of a corpus: int64 [S, L]. Raises `TooLittleText` naming the corpus."""
    texts = (text for shard in corpus.shards for text in documents(store, shard, "test"))
    try:
        return windows_of(texts, source.tokenizer(), min(length, source.max_positions or length), windows)
    except TooLittleText as error:
        raise TooLittleText(error.what, where=f"{corpus.name}", got=error.got, do=error.do) from error


def checkpoint_digest(folder: Path) -> str:
    """Digest of a checkpoint's config and weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return digest_of([[file.name, digest_file(file)] for file in files])


def measure(exam: Examination, folder: Path) -> list[Measurement]:
    """Every measurement of one model folder. With a task skipped nothing is kept: it may be reachable next time."""
    weights = checkpoint_digest(folder)
    key = exam.key(weights)
    artifact = exam.store.find("evaluations", key)
    if artifact is not None:
        return [Measurement(**value) for value in json.loads(exam.store.read_bytes(artifact, "measurements.json"))]
    model = load_variant(folder, device=exam.device, dtype=exam.dtype)
    found = [
        perplexity(model, tokens_SL, name=name, split="test", device=exam.device, batch_tokens=exam.batch_tokens)
        for name, tokens_SL in exam.windows.items()
    ]
    if exam.tasks:
        found += exam.suite.measure(model, exam.tokenizer, max_length=exam.max_length, batch_size=QUESTION_BATCH)
    if not any(value.skipped for value in found):
        with exam.store.publish("evaluations", key, {"weights": weights}) as staged:
            (staged / "measurements.json").write_bytes(canonical_json([dataclasses.asdict(value) for value in found]))
    return found
