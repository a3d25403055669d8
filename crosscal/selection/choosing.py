"""Selection of documents from a pool: score, order, deduplicate, and store them as a corpus of their own.

Only training documents are chosen, and only training documents of the sample define the target. Validation and test
documents are read for one purpose: documents equal or nearly equal to one of them are not chosen.
"""

from __future__ import annotations

# Shapes: N documents of the pool.
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscal.corpora import Corpus, Shard
from crosscal.errors import CorpusError
from crosscal.files.sizes import IMPLEMENTATION
from crosscal.progress import Report, silent
from crosscal.selection.chosen import keep_version, publish_chosen
from crosscal.selection.distinct import DedupResult, distinct, equal_apart
from crosscal.selection.dsir import dsir_scores
from crosscal.selection.settings import DSIR, ZIP_FIT, SelectionSettings
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.selection.zip_fit import zip_fit_scores
from crosscal.store import Store, digest_of

KIND = "selections"
RULE = 1
USED_BY = {DSIR: {"least_words"}, ZIP_FIT: {"targets"}}
"""Settings that only one method uses."""


@dataclass(frozen=True)
class Selection:
    """The chosen documents as a corpus, and counts of chosen and rejected documents."""

    corpus: Corpus
    key: str
    """Key of the artifact with their digests and scores."""
    counts: dict[str, int]
    """`pool` and `sample`: their numbers of training documents; `too_short`; `held_out` and `near_duplicates`: rejected
    among the documents examined in order of their scores; `chosen`."""


def select(
    store: Store,
    name: str,
    pool: Corpus,
    sample: Corpus | None,
    settings: SelectionSettings,
    *,
    held_out: Sequence[Corpus] = (),
    report: Report = silent,
) -> Selection:
    """Choose the training documents of `pool` that are most similar to the training documents of `sample`.

    They become the training documents of the corpus `name`. Its validation and test documents are the sample's (without
    a sample, the pool's), because a chosen corpus is evaluated on the domain, not on the pool. No document is chosen
    that is equal or nearly equal to a validation or test document of pool, sample or `held_out`. The same corpora and
    settings give the same selection, which is stored under a key derived from them.

    Raises `CorpusError` if pool or sample has no training documents, or no document is left to choose.
    """
    evaluated = [pool, *([sample] if sample else []), *held_out]
    said = _determining(pool, sample, evaluated, settings)
    key = digest_of(said)
    if store.find(KIND, key) is None:
        _choose(store, key, said, pool, sample, evaluated, settings, report)
    kept = json.loads(store.read_bytes(store.get(KIND, key), "selection.json"))
    corpus = keep_version(store, name, Shard(**kept["shard"]))
    return Selection(corpus, key, kept["counts"])


def noise(seed: int, digest: bytes) -> float:
    """Return a document's draw from the standard Gumbel distribution: -log(-log(u)), u from SHA-256.

    It depends neither on the landing order nor on other documents, so that a growing pool changes a selection as little
    as possible.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed} ".encode() + digest).digest()[:8], "big")
    return -float(np.log(-np.log((number // 2**11 + 0.5) / 2**53)))


def _determining(
    pool: Corpus, sample: Corpus | None, evaluated: Sequence[Corpus], settings: SelectionSettings
) -> dict[str, Any]:
    unused = set().union(*(names for method, names in USED_BY.items() if method != settings.method))
    used = {name: value for name, value in dataclasses.asdict(settings).items() if name not in unused}
    return {
        "rule": RULE,
        "pool": pool.digest,
        "sample": sample.digest if sample else None,
        "held_out": sorted({shard.key for corpus in evaluated for shard in corpus.shards}),
        **used,
        **({"compressor": IMPLEMENTATION} if settings.method == ZIP_FIT else {}),
    }


def _choose(
    store: Store,
    key: str,
    said: dict[str, Any],
    pool: Corpus,
    sample: Corpus | None,
    evaluated: Sequence[Corpus],
    settings: SelectionSettings,
    report: Report,
) -> None:
    candidates = DocumentTexts(store, parts_of([pool], "train"))
    wanted_like = DocumentTexts(store, parts_of([sample], "train")) if sample else None
    score_N, is_long_N = _scores(candidates, wanted_like, pool, sample, settings, report)
    order = ordered(score_N, is_long_N, _noises(candidates, settings), settings)
    walk = _walk(candidates, order, DocumentTexts(store, parts_of(evaluated, "validation", "test")), settings, report)
    if not walk.chosen:
        short = int((~is_long_N).sum())
        got = f"{len(candidates)} training documents, {short} too short, {walk.held_out} held out"
        do = "Add documents to the pool" + f", or lower `least_words` ({settings.least_words})." * bool(short)
        raise CorpusError("no document is left to choose", where=pool.name, got=got, do=do)
    counts = {
        "pool": len(candidates),
        "sample": len(wanted_like) if wanted_like is not None else 0,
        "too_short": int((~is_long_N).sum()),
        "held_out": walk.held_out,
        "near_duplicates": walk.near_duplicates,
        "chosen": len(walk.chosen),
    }
    scores = None if settings.method is None else score_N[walk.chosen]
    publish_chosen(store, KIND, key, said, candidates, walk.chosen, scores, sample or pool, counts)


def _scores(
    candidates: DocumentTexts,
    wanted_like: DocumentTexts | None,
    pool: Corpus,
    sample: Corpus | None,
    settings: SelectionSettings,
    report: Report,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, flags of documents that are long enough) of the pool's training documents, [N] each."""
    for corpus, texts in ((pool, candidates), (sample, wanted_like)):
        if corpus is not None and not texts:
            do = "Its validation and test documents are not read for that; add others."
            raise CorpusError(
                "the corpus has no training documents to select from or towards", where=corpus.name, do=do
            )
    every = np.ones(len(candidates), dtype=bool)
    if wanted_like is None:
        return np.zeros(len(candidates)), every
    if settings.method == DSIR:
        score_N, words_N = dsir_scores(candidates, wanted_like, report)
        return score_N, words_N >= settings.least_words
    drawn = sorted(np.argsort(_noises(wanted_like, settings), kind="stable")[: settings.targets].tolist())
    return zip_fit_scores(candidates, [wanted_like.text(position) for position in drawn], report), every


def _noises(texts: DocumentTexts, settings: SelectionSettings) -> np.ndarray:
    return np.fromiter((noise(settings.seed, digest) for digest in texts.digests()), np.float64, len(texts))


def ordered(
    score_N: np.ndarray, is_long_N: np.ndarray, noise_N: np.ndarray, settings: SelectionSettings
) -> Iterator[int]:
    """Yield the positions of documents that are long enough, in order of choice.

    DSIR: by score + Gumbel noise, i.e. sampling without replacement with probabilities proportional to exp(score)
    (Gumbel top-k). ZIP-FIT: by score. Ties, and all documents if there are no scores, are ordered by the noise.
    """
    first_N = score_N + noise_N if settings.method == DSIR else score_N
    return (int(position) for position in np.lexsort((-noise_N, -first_N)) if is_long_N[position])


def _walk(
    candidates: DocumentTexts,
    order: Iterator[int],
    held_out: DocumentTexts,
    settings: SelectionSettings,
    report: Report,
) -> DedupResult:
    wanted = settings.documents or len(candidates)
    if settings.near_duplicates is None:
        return equal_apart(candidates, order, wanted, held_out)
    return distinct(candidates, order, wanted, held_out, settings.near_duplicates, report)
