"""From a corpus to the windows that stand for it: one calibration set and one held-out set per shard.

A corpus grows by shards, and each shard is sampled on its own, so that a landed shard costs only its own tokens.
Shard k gets its share of the corpus as it then was, windows · characters_k / (characters_1 + … + characters_k),
rounded, at least one; so the first gets all of the plan's windows, and nothing read before is ever drawn anew. In
the Hessian every shard counts by its share of the characters, however many windows it had:
H = Σ_k share_k · gram_k / tokens_k. A shard that does not fill one window, or none of held-out text, is left out with
a note.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel

from crosscal.calibration import (
    CalibrationSet,
    TemperatureSchedule,
    WindowRequest,
    draw_windows,
    generate_windows,
    random_windows,
    tokenizer_digest,
)
from crosscal.calibration.stop_words import STOP_WORDS
from crosscal.corpora import Corpus, Shard
from crosscal.errors import CalibrationError
from crosscal.models.checkpoint import load_variant
from crosscal.models.source import ModelSource
from crosscal.progress import Report
from crosscal.statistics import Mixture
from crosscal.store import Store


@dataclass(frozen=True)
class Part:
    """One shard's windows: keys of its calibration sets and its share of the corpus."""

    calibration: str
    held_out: str
    share: float
    tokens: int
    held_out_tokens: int


@dataclass(frozen=True)
class Sample:
    """What stands for one corpus in one draw. Shares sum to 1."""

    corpus: str
    seed: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> list[str]:
        return [key for part in self.parts for key in (part.calibration, part.held_out)]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sample:
        parts = tuple(Part(**part) for part in value["parts"])
        return cls(value["corpus"], value["seed"], parts, tuple(value["notes"]))


def over_sets(
    mixture: Mixture, samples: Mapping[str, Sample], *, held_out: bool = False, empty: Collection[str] = ()
) -> Mixture:
    """A mixture of corpora as a mixture of the calibration sets that stand for them.

    `empty`: sets of which no token reached the site in question, as happens to an expert; a corpus's other shards take
    their share. A corpus that has only such sets keeps them, and solving will say that the site is starved.
    """
    weights: dict[str, float] = {}
    for corpus, weight in mixture.weights:
        shares = [(part.held_out if held_out else part.calibration, part.share) for part in samples[corpus].parts]
        shares = [(key, share) for key, share in shares if key not in empty] or shares
        total = sum(share for _, share in shares)
        for key, share in shares:
            weights[key] = weights.get(key, 0.0) + weight * share / total
    return Mixture.of(weights)


@dataclass(frozen=True)
class Draw:
    """How many windows to draw, and how."""

    windows: int
    length: int
    seed: int
    held_out_windows: int

    def calibration(self, windows: int) -> WindowRequest:
        return WindowRequest(windows, self.length, self.seed, "train")

    def held_out(self, windows: int) -> WindowRequest:
        return WindowRequest(windows, self.length, self.seed, "validation")


def sample_documents(store: Store, corpus: Corpus, source: ModelSource, draw: Draw) -> Sample:
    """Draw windows from every shard. Raises `CalibrationError` when not one shard fills a window."""
    tokenizer, digest = source.tokenizer(), tokenizer_digest(source.path)

    def drawn(shard: Shard, request: WindowRequest) -> CalibrationSet:
        return draw_windows(store, shard, tokenizer, digest, request, max_length=source.max_positions)

    parts, notes, seen_characters = [], [], 0
    too_small: CalibrationError | None = None
    for number, shard in enumerate(corpus.shards, start=1):
        characters = shard.characters.get("train", 0)
        seen_characters += characters
        share = characters / seen_characters if seen_characters else 0.0
        try:
            calibration = drawn(shard, draw.calibration(max(1, round(draw.windows * share))))
            held_out = drawn(shard, draw.held_out(max(1, round(draw.held_out_windows * share))))
        except CalibrationError as error:
            too_small = error
            notes.append(f"{corpus.name}: shard {number} of {len(corpus.shards)} is left out: {error.what}.")
            continue
        parts.append((calibration, held_out, characters))
        notes += [f"{corpus.name}: {note}" for note in (*calibration.notes, *held_out.notes)]
    if not parts and too_small is not None:
        raise CalibrationError(too_small.what, where=corpus.name, got=too_small.got, do=too_small.do)
    total = sum(characters for _, _, characters in parts)
    return Sample(
        corpus.name, draw.seed, tuple(_part(c, h, n / total) for c, h, n in parts), tuple(dict.fromkeys(notes))
    )


def sample_random(store: Store, name: str, source: ModelSource, draw: Draw) -> Sample:
    """Uniformly random tokens instead of a corpus."""
    tokenizer, digest = source.tokenizer(), tokenizer_digest(source.path)
    calibration, held_out = (
        random_windows(store, tokenizer, digest, request, max_length=source.max_positions)
        for request in (draw.calibration(draw.windows), draw.held_out(draw.held_out_windows))
    )
    return Sample(name, draw.seed, (_part(calibration, held_out, 1.0),), calibration.notes)


def sample_self(
    store: Store,
    name: str,
    source: ModelSource,
    draw: Draw,
    *,
    temperature: TemperatureSchedule,
    first_tokens: list[str] | None,
    device: str,
    report: Report,
) -> Sample:
    """Text that the model writes itself (arXiv 2410.17170); `first_tokens` None means English stop words, [] any token.

    The model is loaded only if something is still to be written.
    """
    tokenizer, digest = source.tokenizer(), tokenizer_digest(source.path)
    words = STOP_WORDS if first_tokens is None else first_tokens or None

    def generated(request: WindowRequest) -> CalibrationSet:
        return generate_windows(
            store,
            cast(PreTrainedModel, lambda **inputs: loaded()(**inputs)),
            source.digest,
            tokenizer,
            digest,
            request,
            temperature=temperature,
            first_tokens=words,
            device=device,
            max_length=source.max_positions,
            progress=lambda done, total: report(f"{name}: writing", done, total),
        )

    loaded = functools.cache(lambda: load_variant(source.path, device=device))
    calibration = generated(draw.calibration(draw.windows))
    held_out = generated(draw.held_out(draw.held_out_windows))
    return Sample(name, draw.seed, (_part(calibration, held_out, 1.0),), calibration.notes)


def _part(calibration: CalibrationSet, held_out: CalibrationSet, share: float) -> Part:
    return Part(calibration.key, held_out.key, share, calibration.tokens_SL.numel(), held_out.tokens_SL.numel())
