"""From a corpus to the windows that represent it: calibration sets of its training text, and held-out sets.

A corpus grows by shards. Windows are drawn from each shard when it lands, together with the text that earlier shards
left over (see `crosscal.calibration.pool`). In the Hessian every token is weighted by the amount of text it represents,
H = Σ_k weight_k · gram_k / Σ_k weight_k · tokens_k; all weights are 1 until the plan's windows are drawn. Moments are
additive, so all but the newest `parts_kept_apart` sets are stored as one sum (see `crosscal.stages.folding`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from crosscal.calibration import (
    CalibrationSet,
    Pool,
    PoolPart,
    Seeds,
    TemperatureSchedule,
    WindowRequest,
    continued_windows,
    draw_pool,
    generate_windows,
    random_windows,
    tokenizer_digest,
)
from crosscal.calibration.chats import check_template
from crosscal.calibration.continuing import continued_provenance
from crosscal.calibration.generation import first_token_ids, generated_provenance, generation_settings
from crosscal.calibration.sampling import sequence_bytes
from crosscal.calibration.stop_words import STOP_WORDS
from crosscal.corpora import Corpus
from crosscal.corpora.corpus import TEMPLATE
from crosscal.errors import TooLittleText
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from crosscal.progress import Report
from crosscal.stages.memory import usable_bytes
from crosscal.statistics import Mixture
from crosscal.store import Store

WORTH_SAYING = 0.01
"""Share of repeated tokens above which a note reports them."""


@dataclass(frozen=True)
class SplitSets:
    """The calibration sets of one split, as their moments are stored."""

    apart: tuple[PoolPart, ...]
    """The newest sets, each stored separately."""
    folded: PoolPart | None = None
    """The sum of all older sets."""
    whole: PoolPart | None = None
    """The sum of all sets: its key identifies the Hessian, however much of it is folded. None for one set."""
    pool: str | None = None
    """Key of the record of their draws (see `crosscal.calibration.pool`)."""

    @property
    def parts(self) -> tuple[PoolPart, ...]:
        return self.apart if self.folded is None else (self.folded, *self.apart)

    @property
    def key(self) -> str:
        return self.apart[0].key if self.whole is None else self.whole.key

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SplitSets:
        folded, whole = (None if part is None else PoolPart(**part) for part in (value["folded"], value["whole"]))
        return cls(tuple(PoolPart(**part) for part in value["apart"]), folded, whole, value["pool"])


@dataclass(frozen=True)
class Sample:
    """The windows that represent one corpus, for one seed."""

    corpus: str
    seed: int
    calibration: SplitSets
    held_out: SplitSets
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[PoolPart, ...]:
        """The parts of both splits, whose moments a solve reads."""
        return (*self.calibration.parts, *self.held_out.parts)

    @property
    def sets(self) -> list[str]:
        return [part.key for part in self.parts]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def keys(self) -> tuple[str, str]:
        """Identify the Hessians of both splits: (calibration, held-out)."""
        return self.calibration.key, self.held_out.key

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sample:
        calibration, held_out = SplitSets.from_json(value["calibration"]), SplitSets.from_json(value["held_out"])
        return cls(value["corpus"], value["seed"], calibration, held_out, tuple(value["notes"]))


def over_sums(mixture: Mixture, samples: Mapping[str, Sample], *, held_out: bool = False) -> Mixture:
    """Return a mixture by the keys of its Hessians, whatever its corpora are called and however much is folded."""
    weights: dict[str, float] = {}
    for corpus, weight in mixture.weights:
        key = samples[corpus].keys[held_out]
        weights[key] = weights.get(key, 0.0) + weight
    return Mixture.of(weights)


@dataclass(frozen=True)
class Draw:
    """How many windows to draw, and how."""

    windows: int
    length: int
    seed: int
    held_out_windows: int
    parts_kept_apart: int = 4
    """Number of newest sets whose moments are stored separately."""
    begin_token: bool | None = None
    plain_text: bool = False

    def calibration(self, windows: int) -> WindowRequest:
        return self._request(windows, "train")

    def held_out(self, windows: int) -> WindowRequest:
        return self._request(windows, "validation")

    def _request(self, windows: int, split: str) -> WindowRequest:
        return WindowRequest(windows, self.length, self.seed, split, self.begin_token, self.plain_text)


def sample_documents(store: Store, corpus: Corpus, source: ModelSource, draw: Draw) -> Sample:
    """Draw windows from every shard that has not been drawn from yet.

    Raises `TooLittleText` when all documents of a split together do not fill one window, and `CalibrationError` when
    the corpus holds conversations and the model has no template for them.
    """
    tokenizer, digest = source.tokenizer(), tokenizer_digest(source.path)
    if corpus.conversations and corpus.chat == TEMPLATE:
        check_template(tokenizer, corpus.name)
    found, notes = [], []
    for asked in (draw.calibration(draw.windows), draw.held_out(draw.held_out_windows)):
        request, said = dataclasses.replace(asked, chat=corpus.chat).within(source.max_positions)
        pool = draw_pool(store, corpus.shards, tokenizer, digest, request)
        if not pool.parts:
            raise _too_little(corpus, request, pool)
        found.append(sums_of(pool, draw.parts_kept_apart))
        if pool.windows < request.windows:
            said += (f"{pool.windows} windows instead of {request.windows}: the {request.split} split holds no more.",)
        if pool.spelling:
            spelling = f"{pool.spelling} documents of the {request.split} split spell a special token"
            said += (f"{spelling}, which is read as that token; calibration.plain_text reads it as text.",)
        said += tuple(
            f"{count} conversations of the {request.split} split: {what}." for what, count in pool.said.items()
        )
        if pool.tokens_repeated > WORTH_SAYING * pool.tokens_used:
            share = f"{pool.tokens_repeated:,} tokens of the {request.split} split fill windows up"
            said += (f"{share} with the beginning of a conversation that stands whole in another window.",)
        notes += [f"{corpus.name}: {note}" for note in said]
    return Sample(corpus.name, draw.seed, *found, notes=tuple(dict.fromkeys(notes)))


def sums_of(pool: Pool, parts_kept_apart: int) -> SplitSets:
    """Return the newest sets of a pool apart, and the older ones as one folded sum."""
    apart = pool.parts[-parts_kept_apart:]
    folded = pool.sums[-parts_kept_apart - 1] if len(pool.sums) > parts_kept_apart else None
    return SplitSets(apart, folded, pool.sums[-1] if len(pool.sums) > 1 else None, pool.key)


def _too_little(corpus: Corpus, request: WindowRequest, pool: Pool) -> TooLittleText:
    refused = "".join(f"; {count} conversations: {what}" for what, count in pool.said.items())
    return TooLittleText(
        f"the {request.split} split does not fill one window of {request.length} tokens",
        where=corpus.name,
        got=f"{pool.left.tokens} tokens in {corpus.documents(request.split)} documents{refused}",
        do="Add documents or ask for a shorter `length`.",
    )


def sample_random(store: Store, name: str, source: ModelSource, draw: Draw) -> Sample:
    """Draw windows of uniformly random tokens instead of a corpus's text."""
    tokenizer, digest = source.tokenizer(), tokenizer_digest(source.path)
    calibration, held_out = (
        random_windows(store, tokenizer, digest, request, max_length=source.max_positions)
        for request in (draw.calibration(draw.windows), draw.held_out(draw.held_out_windows))
    )
    return Sample(name, draw.seed, _one(calibration), _one(held_out), calibration.notes)


def sample_self(
    store: Store,
    name: str,
    source: ModelSource,
    draw: Draw,
    *,
    temperature: TemperatureSchedule,
    first_tokens: list[str] | None,
    device: str,
    dtype: torch.dtype,
    report: Report,
    seeds: Seeds | None = None,
) -> Sample:
    """Draw windows of text that the model generates (arXiv 2410.17170), in `dtype`: on a CPU bfloat16 takes at least
    twice as long as float32. `first_tokens`: None means English stop words, [] any token.

    With `seeds` the model continues the beginnings of documents instead (arXiv 2410.17711): of training documents for
    calibration, of validation documents for held-out text. It is loaded only if something is still to be generated.
    """
    tokenizer, digest = source.tokenizer(), tokenizer_digest(source.path)
    words = _first_words(first_tokens)
    common = {"temperature": temperature, "device": device, "max_length": source.max_positions}
    common["at_once"] = _sequences_at_once(source, draw, seeds, device, dtype)
    common |= {"progress": lambda done, total: report(f"{name}: writing", done, total)}
    loaded = functools.cache(lambda: load_variant(source.path, device=device, dtype=dtype))
    model = cast(PreTrainedModel, lambda **inputs: loaded()(**inputs))
    writing = _writing(source, dtype)

    def written(request: WindowRequest) -> CalibrationSet:
        given = (store, model, writing, tokenizer, digest, request)
        if seeds is not None:
            return continued_windows(*given, seeds, **common)
        return generate_windows(*given, first_tokens=words, **common)

    calibration = written(draw.calibration(draw.windows))
    held_out = written(draw.held_out(draw.held_out_windows))
    return Sample(name, draw.seed, _one(calibration), _one(held_out), calibration.notes)


def written_provenance(
    source: ModelSource,
    request: WindowRequest,
    *,
    temperature: TemperatureSchedule,
    first_tokens: list[str] | None,
    dtype: torch.dtype,
    seeds: Seeds | None,
) -> dict[str, Any]:
    """Return the provenance of the windows that `sample_self` generates for a request."""
    tokenizer = source.tokenizer()
    given = (_writing(source, dtype), tokenizer, tokenizer_digest(source.path), request)
    if seeds is not None:
        return continued_provenance(*given, seeds, temperature)
    words = _first_words(first_tokens)
    settings = generation_settings(*given, temperature, None if words is None else first_token_ids(tokenizer, words))
    return generated_provenance(settings, tokenizer, request)


def _first_words(first_tokens: list[str] | None) -> Sequence[str] | None:
    return STOP_WORDS if first_tokens is None else first_tokens or None


def _writing(source: ModelSource, dtype: torch.dtype) -> str:
    """Identify the model that generates text: in another dtype it generates other text."""
    return source.digest if dtype == source.dtype else f"{source.digest}, {dtype}"


def _sequences_at_once(source: ModelSource, draw: Draw, seeds: Seeds | None, device: str, dtype: torch.dtype) -> int:
    """Return how many sequences fit in half of the memory that is free beside the model's weights, at least one."""
    length, prompt = min(draw.length, source.max_positions or draw.length), 1 + (seeds.prefix_tokens if seeds else 0)
    text = source.config.get_text_config()
    sizes = {"blocks": source.blocks, "hidden": text.hidden_size, "vocabulary": text.vocab_size}
    one = sequence_bytes(length, prompt, **sizes, itemsize=dtype.itemsize)
    return max(1, (usable_bytes(device) - source.parameters * dtype.itemsize) // 2 // one)


def _one(calibration: CalibrationSet) -> SplitSets:
    return SplitSets((PoolPart(calibration.key, calibration.tokens_SL.numel()),))
