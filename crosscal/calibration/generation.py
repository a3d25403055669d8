"""Self-calibration: the model generates its own calibration text.

Williams, Chrysostomou, Aletras: "Self-calibration for language model quantization and pruning", NAACL 2025,
https://arxiv.org/abs/2410.17170.
"""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.cutting import cut
from crosscal.calibration.sampling import SequenceWriter, TemperatureSchedule
from crosscal.calibration.sets import CalibrationSet, WindowRequest, stored_windows
from crosscal.calibration.stop_words import STOP_WORDS
from crosscal.calibration.tokens import begin_token, end_token, ordinary_tokens
from crosscal.errors import CalibrationError
from crosscal.progress import Added, Progress, adding
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATIONS = "generations"
BATCH = 32
"""Maximum number of sequences generated and stored together: on a CPU, half the time per token of 8."""
MIN_MEAN_TOKENS = 8
"""A model whose texts have fewer tokens than this on average is rejected."""


def generate_windows(
    store: Store,
    model: PreTrainedModel,
    model_digest: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    *,
    temperature: TemperatureSchedule = TemperatureSchedule(),  # noqa: B008  a frozen value
    first_tokens: Sequence[str] | None = STOP_WORDS,
    batch: int | None = None,
    at_once: int | None = None,
    device: str = "cpu",
    max_length: int | None = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Generate `request.windows` windows with `model` (on `device`, in eval mode), prompted only by the start token.

    Each sequence is sampled from the whole distribution until end-of-text or the length of a window. Only its first
    token is restricted, to tokens that decode to one of `first_tokens` (None: no restriction). The sequences, start
    tokens included, are joined in order and cut into windows, which begin like those of documents. Every finished
    batch of sequences is stored, so that an interrupted run resumes there. Neither `batch` nor `at_once`, the number
    generated together, changes a text. `progress` is called with (tokens so far, tokens needed).

    Raises `CalibrationError` if no token may come first or the model generates hardly anything.
    """
    request, notes = request.within(max_length)
    if tokenizer.bos_token_id is None:
        notes += ("The tokenizer has no begin-of-text token: texts begin with end-of-text instead.",)
    begin, start, end = begin_token(tokenizer, request.begin_token), start_token(tokenizer), end_token(tokenizer)
    first_ids = None if first_tokens is None else first_token_ids(tokenizer, first_tokens)
    settings = generation_settings(model_digest, tokenizer, tokenizer_digest, request, temperature, first_ids)
    provenance = generated_provenance(settings, tokenizer, request)
    writer = SequenceWriter(model, start, end, request.length, temperature, first_ids, device, at_once)
    texts = _Texts(store, writer, settings, batch or min(BATCH, request.windows))
    tokens_SL = stored_windows(store, provenance, lambda: texts.windows(request, begin, progress))
    return CalibrationSet(tokens_SL, provenance, notes)


def generation_settings(
    model_digest: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    temperature: TemperatureSchedule,
    first_ids: Sequence[int] | None,
) -> dict[str, Any]:
    """Return everything that determines the texts of `generate_windows`, however many are needed."""
    return {
        "source": "model",
        "rule": 2,
        "model": model_digest,
        "tokenizer": tokenizer_digest,
        "length": request.length,
        "seed": request.seed,
        "split": request.split,  # held-out texts are generated separately
        "temperature": dataclasses.asdict(temperature),
        "first_ids": None if first_ids is None else digest_of(first_ids),
        "start": start_token(tokenizer),
    }


def generated_provenance(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, request: WindowRequest
) -> dict[str, Any]:
    """Return the provenance of the windows that `generate_windows` cuts from the texts of these settings."""
    begin = begin_token(tokenizer, request.begin_token)
    return {**settings, **dataclasses.replace(request, plain_text=False).provenance(begin)}


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that every text is generated from: beginning-of-text, or end-of-text if there is none."""
    start: Any = tokenizer.bos_token_id
    return end_token(tokenizer) if start is None else start


def first_token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[int, ...]:
    """Return the tokens that decode to one of the words, ignoring case and surrounding white space."""
    wanted = {word.lower() for word in words}
    ids = ordinary_tokens(tokenizer)
    decoded = tokenizer.batch_decode([[index] for index in ids])
    found = tuple(index for index, text in zip(ids, decoded, strict=True) if text.strip().lower() in wanted)
    if not found:
        raise CalibrationError("no token of the vocabulary is one of the first words", do="Pass `first_tokens=None`.")
    return found


def readable(calibration_set: CalibrationSet, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Return the first `count` windows as text, including special tokens."""
    return tokenizer.batch_decode(calibration_set.tokens_SL[:count].tolist())


@dataclass(frozen=True)
class _Texts:
    store: Store
    writer: SequenceWriter
    settings: dict[str, Any]
    batch: int

    def windows(self, request: WindowRequest, begin: int | None, progress: Progress | None) -> torch.Tensor:
        sequences = self._sequences(request.windows * request.length, progress)
        windows = islice(cut(sequences, request.length, begin), request.windows)
        return torch.from_numpy(np.stack(list(windows))).long()

    def _sequences(self, needed: int, progress: Progress | None) -> Iterator[list[int]]:
        """Yield sequences endlessly; about `needed` tokens will be consumed."""
        most_sequences = needed / min(MIN_MEAN_TOKENS, self.writer.length / 2) + 16 * self.batch
        tokens = sequences = 0
        while True:
            if sequences > most_sequences:
                raise CalibrationError(
                    "the texts that the model generates are too short",
                    got=f"{tokens / sequences:.1f} tokens a text",
                    do="Use real documents, or another temperature.",
                )
            rows = self._batch(range(sequences, sequences + self.batch), adding(progress, tokens, needed))
            tokens += sum(map(len, rows))
            sequences += len(rows)
            if progress:
                progress(min(tokens, needed), needed)
            yield from rows

    def _batch(self, numbers: range, sampled: Added | None) -> list[list[int]]:
        """Return the sequences of these numbers, from the store if they were generated before."""
        settings = {**self.settings, "numbers": [numbers.start, numbers.stop]}
        key = digest_of(settings)
        if artifact := self.store.find(GENERATIONS, key):
            return json.loads(self.store.read_bytes(artifact, "sequences.json"))
        rows = self.writer.write(numbers, seed_of(self.settings), sampled=sampled)
        with self.store.publish(GENERATIONS, key, settings) as folder:
            (folder / "sequences.json").write_text(json.dumps(rows))
        return rows


def seed_of(settings: dict[str, Any]) -> int:
    """Return a seed derived from the settings: different settings give different seeds."""
    return int(digest_of(settings)[:15], 16)
