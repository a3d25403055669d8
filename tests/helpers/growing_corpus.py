"""A corpus that grows by files of made-up texts, with a calibration pass and a fold for each."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from crosscal.calibration import PoolPart
from crosscal.calibration.pool import all_parts, read_pool
from crosscal.corpora import Corpus, ingest, load_corpus
from crosscal.models import ModelSource
from crosscal.stages.folding import fold, sets_to_read
from crosscal.stages.sample import Draw, Sample, SplitSets, sample_documents
from crosscal.statistics import EVERY, Statistic
from crosscal.store import Store
from tests.helpers.tiny_run import collect, dense_cache
from tests.helpers.tiny_text import SENTENCES

LENGTH = 32
ALL = Draw(windows=10_000, length=LENGTH, seed=0, held_out_windows=10_000, parts_kept_apart=2)


def texts(count: int, seed: int = 0, sentences: int = 1) -> list[str]:
    chance = random.Random(seed)
    return [f"{seed} {number}: " + " ".join(chance.choices(SENTENCES, k=sentences)) for number in range(count)]


def land(store: Store, folder: Path, files: Sequence[Sequence[str]], name: str = "legal") -> Corpus:
    """Ingest each file separately."""
    folder.mkdir(exist_ok=True)
    for number, lines in enumerate(files):
        file = folder / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        ingest(store, name, [str(file)])
    return load_corpus(store, name)


def grow(
    tmp_path: Path, source: ModelSource, draw: Draw, landings: int, wanted: frozenset[Statistic] = EVERY
) -> tuple[Store, list[Sample], list[int]]:
    """Land files one by one, with a calibration pass and a fold each; return samples and tokens run for each."""
    store, samples, read = Store(tmp_path / "home"), [], []
    cached = dataclasses.replace(dense_cache(store, source), wanted=wanted)
    chance = random.Random(0)
    files = [texts(60, seed=99, sentences=2)]
    files += [texts(chance.choice((4, 9)), seed=number, sentences=2) for number in range(landings)]
    for number in range(len(files)):
        corpus = land(store, tmp_path / f"{number}", [files[number]])
        sample = sample_documents(store, corpus, source, draw)
        read.append(collect(cached, source, sets_to_read(cached, source.blocks, sample)).tokens_read)
        fold(cached, source.blocks, sample)
        samples.append(sample)
    return store, samples, read


def drawn(store: Store, sums: SplitSets) -> list[PoolPart]:
    """Every set that was ever drawn."""
    assert sums.pool is not None
    return all_parts(store, read_pool(store, sums.pool))
