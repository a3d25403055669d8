"""The held-out text that models are measured on: windows of each corpus's test and validation splits.

Shapes: S windows, L tokens in a window.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from crosscal.calibration import tokenizer_digest
from crosscal.calibration.chats import check_template, template_settings
from crosscal.calibration.sets import stored_windows
from crosscal.calibration.tokens import Readable, begin_token, chat_begin_token
from crosscal.corpora import Corpus
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.errors import TooLittleText
from crosscal.evaluation import TEST, VALIDATION, windows_of
from crosscal.models.source import ModelSource
from crosscal.progress import Report, silent
from crosscal.store import Store, digest_of


@dataclass(frozen=True, eq=False)
class HeldOutText:
    """Windows of one corpus and split."""

    corpus: str
    split: str
    tokens_SL: torch.Tensor

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(self.tokens_SL.tolist())


@dataclass(frozen=True)
class WindowCutting:
    """How to cut windows out of text, and how many."""

    length: int
    """Tokens per window, at most the model's maximum."""
    windows: dict[str, int]
    """Split -> maximum number of windows per corpus."""
    begin: bool | None = None
    """Whether windows begin with beginning-of-text; None: the tokenizer's default."""
    plain_text: bool = False

    def within(self, max_length: int | None) -> tuple[WindowCutting, tuple[str, ...]]:
        """Return the cutting with `length` limited to the model's `max_length`, and a note if that changed it."""
        if max_length is None or self.length <= max_length:
            return self, ()
        note = f"Evaluation windows have {max_length} tokens instead of {self.length}: the model takes no more."
        return replace(self, length=max_length), (note,)


def heldout_texts(
    store: Store, corpora: Sequence[Corpus], source: ModelSource, cutting: WindowCutting, report: Report = silent
) -> tuple[tuple[HeldOutText, ...], tuple[str, ...]]:
    """Return the test text of every corpus, then the validation text of those that have a window of it; and notes, on
    each of the others and on a length that the model limits. Raises `TooLittleText` naming a corpus without a window
    of test text."""

    def text(corpus: Corpus, split: str) -> HeldOutText:
        return HeldOutText(corpus.name, split, windows_for(store, corpus, split, source, cutting, report))

    of_test, of_validation = [text(corpus, TEST) for corpus in corpora], []
    notes = [*cutting.within(source.max_positions)[1]]
    for corpus in corpora:
        try:
            of_validation.append(text(corpus, VALIDATION))
        except TooLittleText as error:
            notes.append(f"{corpus.name} has no validation text, so it is not used for selection ({error.got}).")
    return (*of_test, *of_validation), tuple(notes)


def windows_for(
    store: Store, corpus: Corpus, split: str, source: ModelSource, cutting: WindowCutting, report: Report = silent
) -> torch.Tensor:
    """Return windows spread over all documents of a split, int64 [S, L]; they are cut once, then read from the store.

    Raises `TooLittleText` naming the corpus.
    """
    cutting, _ = cutting.within(source.max_positions)
    length, wanted, tokenizer = cutting.length, cutting.windows[split], source.tokenizer()
    is_rendered = corpus.conversations and corpus.chat == TEMPLATE
    if is_rendered:
        check_template(tokenizer, corpus.name)
    provenance: dict[str, Any] = {
        "source": "held-out documents",
        "rule": 1,
        "shards": [shard.key for shard in corpus.shards],
        "split": split,
        "tokenizer": tokenizer_digest(source.path),
        "windows": wanted,
        "length": length,
        "begin": [begin_token(tokenizer, cutting.begin), chat_begin_token(tokenizer, cutting.begin)],
        "chat": template_settings(tokenizer) if is_rendered else corpus.chat,
        "plain_text": cutting.plain_text,
    }

    def made() -> torch.Tensor:
        found = (each for shard in corpus.shards for each in readings(store, shard, split, corpus.chat))
        told = _told(found, f"{corpus.name}: reading {split} documents", corpus.documents(split), report)
        return windows_of(told, tokenizer, length, wanted, begin=cutting.begin, plain_text=cutting.plain_text)

    try:
        return stored_windows(store, provenance, made)
    except TooLittleText as error:
        raise TooLittleText(error.what, where=corpus.name, got=error.got, do=error.do) from error


def _told(texts: Iterable[Readable], what: str, total: int, report: Report) -> Iterator[Readable]:
    for done, text in enumerate(texts):
        report(what, done, total)
        yield text
