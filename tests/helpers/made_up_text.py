"""Documents of two made-up domains, as corpora in a store."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from crosscal.corpora import Corpus, ingest
from crosscal.store import Store

_CHANCE = random.Random("words")
WORDS = ["".join(_CHANCE.choices("abcdefghijklmnop", k=_CHANCE.randint(3, 9))) for _ in range(600)]
DOMAINS = {"law": range(400), "medicine": range(200, 600)}
"""Indices into `WORDS`; 200 words, half of each domain's, are common to both."""


def made_up(domain: str, seed: str, count: int, words: int = 130) -> list[str]:
    """Return `count` documents of `words` words, in sentences of six to twelve."""
    chance, vocabulary = random.Random(f"{domain} {seed}"), [WORDS[number] for number in DOMAINS[domain]]
    texts = []
    for _ in range(count):
        drawn = chance.choices(vocabulary, k=words)
        sentences, at = [], 0
        while at < words:
            after = at + chance.randint(6, 12)
            sentences.append(" ".join(drawn[at:after]).capitalize() + ".")
            at = after
        texts.append(" ".join(sentences))
    return texts


def edited(text: str, share: float, seed: str) -> str:
    """Return the text with this share of its words replaced by others."""
    chance, words = random.Random(seed), text.split()
    for place in chance.sample(range(len(words)), round(share * len(words))):
        words[place] = chance.choice(WORDS) + "x"
    return " ".join(words)


def corpus_of(store: Store, folder: Path, name: str, splits: Mapping[str, Sequence[str]]) -> Corpus:
    """Ingest these documents per split into a corpus, in addition to what it contains."""
    place = folder / f"{name}-{len(list(folder.glob(f'{name}-*')))}"
    place.mkdir(parents=True)
    for split, texts in splits.items():
        (place / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ingest(store, name, [str(place)]).corpus
