"""Self-calibration seeded by a domain: the model continues the beginnings of the domain's documents.

Ji et al.: "Beware of calibration data for pruning large language models", ICLR 2025, https://arxiv.org/abs/2410.17711,
section 4. The paper's code drops the 20 % of texts with the highest perplexity under the model, prefix included, and
uses prefixes of 1, 2 or 64 tokens. Sampling here is unrestricted, at temperature 1 unless set otherwise; the paper uses
top-k 50 and top-p 0.95, at temperatures 0.6 and 0.8.
"""

from __future__ import annotations

# Shapes: S windows, L tokens in a window, B texts generated together, P tokens of a prefix.
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crosscal.calibration.chats import template_settings
from crosscal.calibration.cutting import cut
from crosscal.calibration.generation import BATCH, GENERATIONS, MIN_MEAN_TOKENS, seed_of
from crosscal.calibration.sampling import GeneratedText, SequenceWriter, TemperatureSchedule
from crosscal.calibration.sets import CalibrationSet, WindowRequest, stored_windows
from crosscal.calibration.tokens import EncodedDocuments, begin_token, end_token
from crosscal.corpora import Shard
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.errors import CalibrationError
from crosscal.progress import Added, Progress, adding
from crosscal.store import Store, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seeds:
    """Documents whose beginnings are continued."""

    corpus: str
    shards: Sequence[Shard]
    prefix_tokens: int = 64
    drop: float = 0.2
    """Fraction of the texts that is dropped: those of the highest perplexity."""
    chat: str = TEMPLATE
    """How conversations are read."""

    def said(self, split: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the entries of a provenance that describe the seeds."""
        shards = [shard for shard in self.shards if shard.documents.get(split)]
        keys = [shard.key for shard in shards]
        said = {"seeds": digest_of(keys), "prefix_tokens": self.prefix_tokens, "drop": self.drop}
        if self.chat != TEMPLATE:
            return said | {"chat": self.chat}
        has_chats = any(shard.conversations.get(split) for shard in shards)
        return said | ({"chat": template_settings(tokenizer)} if has_chats else {})


def continued_windows(
    store: Store,
    model: PreTrainedModel,
    model_digest: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    seeds: Seeds,
    *,
    temperature: TemperatureSchedule = TemperatureSchedule(),  # noqa: B008  a frozen value
    batch: int | None = None,
    at_once: int | None = None,
    device: str = "cpu",
    max_length: int | None = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Build `request.windows` windows from beginnings of documents of the split that `model` continues.

    Documents are taken in a seeded order, skipping those shorter than the prefix, and from the first again when the
    order is exhausted. Texts are generated until those that are kept fill the windows, which is checked after every
    batch; the kept texts are joined in the order of generation. Every finished batch is stored. `at_once`, the number
    of sequences generated together, changes no text.

    Raises `CalibrationError` if the prefix is not shorter than a window, no document is as long as the prefix, or the
    model adds hardly any tokens.
    """
    request, notes = request.within(max_length)
    if seeds.prefix_tokens >= request.length:
        raise CalibrationError(
            "the prefixes leave no tokens to generate",
            where=seeds.corpus,
            got=f"prefixes of {seeds.prefix_tokens} tokens for texts of {request.length}",
            do="Lower `prefix_tokens`.",
        )
    batch = batch or min(BATCH, request.windows)
    provenance = continued_provenance(model_digest, tokenizer, tokenizer_digest, request, seeds, temperature, batch)
    begin, end = begin_token(tokenizer, request.begin_token), end_token(tokenizer)
    start = end if begin is None else begin
    writer = SequenceWriter(model, start, end, request.length, temperature, None, device, at_once)

    def made() -> torch.Tensor:
        prefixes = _prefixes(store, seeds, tokenizer, request, begin, end)
        texts = _Texts(store, writer, {name: value for name, value in provenance.items() if name != "windows"})
        windows = texts.windows(prefixes, batch, seeds, request, begin, progress)
        return torch.from_numpy(np.stack(windows)).long()

    return CalibrationSet(stored_windows(store, provenance, made), provenance, notes)


def continued_provenance(
    model_digest: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    request: WindowRequest,
    seeds: Seeds,
    temperature: TemperatureSchedule,
    batch: int | None = None,
) -> dict[str, Any]:
    """Return the provenance of the windows that `continued_windows` builds."""
    return {
        "source": "model",
        "rule": 2,
        "model": model_digest,
        "tokenizer": tokenizer_digest,
        **seeds.said(request.split, tokenizer),
        "temperature": dataclasses.asdict(temperature),
        "batch": batch or min(BATCH, request.windows),
        **request.provenance(begin_token(tokenizer, request.begin_token)),
    }


def kept(texts: Sequence[GeneratedText], drop: float) -> list[GeneratedText]:
    """Return the texts, in order, without the floor(drop · n) of highest perplexity; of equals the later go first."""
    ranked = sorted(range(len(texts)), key=lambda place: texts[place].nll)
    return [texts[place] for place in sorted(ranked[: len(texts) - int(drop * len(texts))])]


@dataclass(frozen=True)
class _Texts:
    store: Store
    writer: SequenceWriter
    settings: dict[str, Any]

    def windows(
        self,
        prefixes: Iterator[list[int]],
        batch: int,
        seeds: Seeds,
        request: WindowRequest,
        begin: int | None,
        progress: Progress | None,
    ) -> list[np.ndarray]:
        texts: list[GeneratedText] = []
        needed, tokens = request.windows * request.length, 0
        for number in itertools.count():
            numbers = range(number * batch, (number + 1) * batch)
            sampled = adding(progress, tokens, needed, share=1 - seeds.drop)
            texts += self._batch(numbers, list(itertools.islice(prefixes, batch)), sampled)
            good = kept(texts, seeds.drop)
            tokens = sum(len(text.tokens) for text in good)
            if progress:
                progress(min(tokens, needed), needed)
            if tokens < needed - request.windows:  # the first token of each window may be added by `cut`
                continue
            windows = list(itertools.islice(cut((t.tokens for t in good), request.length, begin), request.windows))
            if len(windows) == request.windows:
                break
        written = sum(len(text.tokens) for text in texts) / len(texts) - seeds.prefix_tokens
        if written < min(MIN_MEAN_TOKENS, (request.length - seeds.prefix_tokens) / 2):
            raise CalibrationError(
                "the model adds hardly anything to the beginnings of documents",
                where=seeds.corpus,
                got=f"{written:.1f} tokens a text",
                do="Use the documents themselves, or another temperature.",
            )
        return windows

    def _batch(self, numbers: range, prefixes: list[list[int]], sampled: Added | None) -> list[GeneratedText]:
        """Return the texts of these numbers, from the store if they were generated before."""
        settings = {**self.settings, "numbers": [numbers.start, numbers.stop], "prefixes": digest_of(prefixes)}
        key = digest_of(settings)
        if artifact := self.store.find(GENERATIONS, key):
            return [GeneratedText(**text) for text in json.loads(self.store.read_bytes(artifact, "texts.json"))]
        seed = seed_of(self.settings)
        texts = self.writer.continued(torch.tensor(prefixes), numbers, seed, judged=True, sampled=sampled)
        with self.store.publish(GENERATIONS, key, settings) as folder:
            (folder / "texts.json").write_text(json.dumps([dataclasses.asdict(text) for text in texts]))
        return texts


def _prefixes(
    store: Store,
    seeds: Seeds,
    tokenizer: PreTrainedTokenizerBase,
    request: WindowRequest,
    begin: int | None,
    end: int,
) -> Iterator[list[int]]:
    """Yield beginnings of documents endlessly: `prefix_tokens` tokens each, after `begin` if there is one."""
    places = [(shard, row) for shard in seeds.shards for row in range(shard.documents.get(request.split, 0))]
    order = np.random.Generator(np.random.PCG64(request.seed)).permutation(len(places)).tolist()
    while True:
        found = 0
        taken = (places[place] for place in order)
        texts = (text for shard, row in taken for text in readings(store, shard, request.split, seeds.chat, [row]))
        for encoded in EncodedDocuments(tokenizer, texts, None, plain_text=request.plain_text):
            ids = encoded if isinstance(encoded, list) else encoded.ids
            own = ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
            own = own[:-1] if own[-1:] == [end] else own
            if len(own) >= seeds.prefix_tokens:
                found += 1
                yield ([] if begin is None else [begin]) + own[: seeds.prefix_tokens]
        if not found:
            raise CalibrationError(
                f"no {request.split} document is as long as a prefix",
                where=seeds.corpus,
                got=f"{len(places)} documents, prefixes of {seeds.prefix_tokens} tokens",
                do="Lower `prefix_tokens`, or add longer documents.",
            )
