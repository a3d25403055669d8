"""Self-calibration: the model writes its own calibration text.

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
from crosscal.progress import Progress
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERATIONS = "generations"
BATCH = 32
"""Most sequences that are written together and stored together: on a CPU half the time a token of 8."""
MIN_MEAN_TOKENS = 8
"""A model whose texts are shorter than this on average is not writing."""


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
    """Let `model` (on `device`, in eval mode) write `request.windows` windows from nothing but the start token.

    Each sequence is sampled from the whole distribution until end-of-text or the length of a window; only its first
    token is restricted, to those that read as one of `first_tokens` (None: no restriction). The sequences, start
    tokens included, are joined in order and cut into windows, which begin as those of documents do. Every finished
    batch of sequences is stored, so that an interrupted run goes on where it stopped; neither `batch` nor `at_once`,
    how many are written side by side, changes a text. `progress` is called with (tokens so far, tokens needed).

    Raises `CalibrationError` when no token may come first or the model hardly writes anything.
    """
    request, notes = request.within(max_length)
    end = end_token(tokenizer)
    start: Any = tokenizer.bos_token_id
    if start is None:
        start = end
        notes += ("The tokenizer has no begin-of-text token: texts begin with end-of-text instead.",)
    begin = begin_token(tokenizer, request.begin_token)
    first_ids = None if first_tokens is None else first_token_ids(tokenizer, first_tokens)
    settings = {
        "source": "model",
        "rule": 2,
        "model": model_digest,
        "tokenizer": tokenizer_digest,
        "length": request.length,
        "seed": request.seed,
        "split": request.split,  # a held-out set is written anew, too
        "temperature": dataclasses.asdict(temperature),
        "first_ids": None if first_ids is None else digest_of(first_ids),
        "start": start,
    }
    provenance = {**settings, **dataclasses.replace(request, plain_text=False).provenance(begin)}
    writer = SequenceWriter(model, start, end, request.length, temperature, first_ids, device, at_once)
    texts = _Texts(store, writer, settings, batch or min(BATCH, request.windows))
    tokens_SL = stored_windows(store, provenance, lambda: texts.windows(request, begin, progress))
    return CalibrationSet(tokens_SL, provenance, notes)


def first_token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[int, ...]:
    """Tokens that decode to one of the words, whatever the case and with or without a space in front."""
    wanted = {word.lower() for word in words}
    ids = ordinary_tokens(tokenizer)
    decoded = tokenizer.batch_decode([[index] for index in ids])
    found = tuple(index for index, text in zip(ids, decoded, strict=True) if text.strip().lower() in wanted)
    if not found:
        raise CalibrationError("no token of the vocabulary is one of the first words", do="Pass `first_tokens=None`.")
    return found


def readable(calibration_set: CalibrationSet, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first windows as text, special tokens shown."""
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
        """Sequence after sequence, without an end; about `needed` tokens will be asked for."""
        most_sequences = needed / min(MIN_MEAN_TOKENS, self.writer.length / 2) + 16 * self.batch
        tokens = sequences = 0
        while True:
            if sequences > most_sequences:
                raise CalibrationError(
                    "the model ends its texts almost at once",
                    got=f"{tokens / sequences:.1f} tokens a text",
                    do="Use real documents, or another temperature.",
                )
            rows = self._batch(range(sequences, sequences + self.batch))
            tokens += sum(map(len, rows))
            sequences += len(rows)
            if progress:
                progress(min(tokens, needed), needed)
            yield from rows

    def _batch(self, numbers: range) -> list[list[int]]:
        """The sequences of these numbers, from the store if they were written before."""
        settings = {**self.settings, "numbers": [numbers.start, numbers.stop]}
        key = digest_of(settings)
        if artifact := self.store.find(GENERATIONS, key):
            return json.loads(self.store.read_bytes(artifact, "sequences.json"))
        rows = self.writer.write(numbers, seed_of(self.settings))
        with self.store.publish(GENERATIONS, key, settings) as folder:
            (folder / "sequences.json").write_text(json.dumps(rows))
        return rows


def seed_of(settings: dict[str, Any]) -> int:
    """Another one for all other settings."""
    return int(digest_of(settings)[:15], 16)
