"""Measuring one model, dense or compressed, once: what was measured on the same weights and windows is found again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from crosscal.corpora import Corpus, documents
from crosscal.evaluation import Measurement, QuestionSuite, perplexity, windows_of
from crosscal.models.checkpoint import load_variant
from crosscal.models.source import ModelSource
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.keys import canonical_json

FORMAT = 1
QUESTION_BATCH = 32


@dataclass(frozen=True, eq=False)
class Examination:
    """What every model of a run is measured on."""

    store: Store
    windows: dict[str, torch.Tensor]
    """Corpus -> test windows [S, L]."""
    tokenizer: PreTrainedTokenizerBase
    suite: QuestionSuite
    tasks: tuple[str, ...]
    limit: int | None
    batch_tokens: int
    device: str
    dtype: torch.dtype

    def key(self, weights: str) -> str:
        """Digest of the weights and of everything they are measured on."""
        windows = {name: digest_of(tokens_SL.tolist()) for name, tokens_SL in self.windows.items()}
        tasks = [digest_file(Path(task)) if Path(task).is_file() else task for task in self.tasks]
        return digest_of([FORMAT, weights, windows, tasks, self.limit, str(self.dtype)])


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
    tokenizer = source.tokenizer()
    length = min(length, source.max_positions or length)

    def cut(corpus: Corpus) -> torch.Tensor:
        texts = (text for shard in corpus.shards for text in documents(store, shard, "test"))
        return windows_of(texts, tokenizer, length, windows)

    tokens = {corpus.name: cut(corpus) for corpus in corpora}
    suite = QuestionSuite.load(tasks, limit=limit)
    return Examination(store, tokens, tokenizer, suite, tuple(tasks), limit, batch_tokens, device, dtype)


def checkpoint_digest(folder: Path) -> str:
    """Digest of a checkpoint's config and weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return digest_of([[file.name, digest_file(file)] for file in files])


def measure(exam: Examination, folder: Path) -> list[Measurement]:
    """Every measurement of one model folder."""
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
        positions = model.config.get_text_config().max_position_embeddings
        found += exam.suite.measure(model, exam.tokenizer, max_length=positions, batch_size=QUESTION_BATCH)
    with exam.store.publish("evaluations", key, {"weights": weights}) as staged:
        (staged / "measurements.json").write_bytes(canonical_json([dataclasses.asdict(value) for value in found]))
    return found
