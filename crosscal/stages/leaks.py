"""Check whether calibration text contains evaluation text.

The training text of the corpora that a plan calibrates on is compared with the validation and test text of all its
corpora and with the questions of local files. Some corpora consist of near copies, above all web pages and forms: of
100 texts from one source, split at random, as many are near copies of training documents as training documents are of
one another. Therefore a sample of a corpus's training documents is compared with all others, too. Validation and test
text leaks if more of it is found than of that sample (by three standard deviations of the count). For questions, any
match is a leak. Results are stored and reused as long as no document of either side changes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from crosscal.calibration.ngrams import NGRAM_WORDS
from crosscal.calibration.overlap import LEAK_SHARE, MOST_DOCUMENTS, DocumentOverlap, SetOverlap, overlaps
from crosscal.corpora import Corpus, documents
from crosscal.errors import EvaluationError
from crosscal.evaluation.tasks import LocalTask
from crosscal.progress import Report, silent
from crosscal.store import Store, digest_of

FORMAT = 1  # of stored results; bump when something else is compared
KIND = "overlaps"
FILE = "overlaps.json"
EVALUATED = ("validation", "test")
TRAIN = "train"
SAMPLED = 200
"""Training documents per corpus that are compared with the others, evenly spread."""
DEVIATIONS = 3.0


@dataclasses.dataclass(frozen=True)
class ComparedTexts:
    """The texts on both sides of the comparison."""

    store: Store
    corpora: Mapping[str, Corpus]
    """By their names in the plan."""
    calibrated: tuple[str, ...]
    """Names of the corpora that are calibrated on: their training text is searched."""
    questions: tuple[LocalTask, ...]

    @classmethod
    def of(
        cls, store: Store, corpora: Mapping[str, Corpus], calibrated: Collection[str], questions: Sequence[LocalTask]
    ) -> ComparedTexts:
        used = tuple(name for name in corpora if name in calibrated)
        return cls(store, corpora, used, tuple(questions))

    @property
    def key(self) -> str:
        shards = {name: [shard.key for shard in corpus.shards] for name, corpus in self.corpora.items()}
        questions = {task.name: task.digest for task in self.questions}
        limits = [NGRAM_WORDS, LEAK_SHARE, MOST_DOCUMENTS]
        return digest_of([FORMAT, limits, sorted(shards.items()), list(self.calibrated), questions])

    def calibration(self) -> Iterator[tuple[str, str]]:
        return ((name, text) for name in self.calibrated for text in self._documents(name, TRAIN))

    def evaluation(self) -> Iterator[tuple[str, str]]:
        for name in self.corpora:
            for split in EVALUATED:
                yield from ((_name(name, split), text) for text in self._documents(name, split))
            yield from ((_name(name, TRAIN), text) for text in self._sample(name))
        for task in self.questions:
            # With the correct answer: a passage that a question merely continues occurs in many documents.
            yield from ((task.name, f"{each.question} {each.choices[each.answer]}") for each in task.questions)

    @property
    def own(self) -> set[str]:
        """Names of the sets that are samples of calibration text."""
        return {_name(name, TRAIN) for name in self.calibrated}

    def _sample(self, name: str) -> Iterator[str]:
        first, step = 0, -(-self.corpora[name].documents(TRAIN) // SAMPLED)
        for shard in self.corpora[name].shards:
            count = shard.documents.get(TRAIN, 0)
            yield from documents(self.store, shard, TRAIN, range(-first % step if step else 0, count, step or 1))
            first += count

    def _documents(self, name: str, split: str) -> Iterator[str]:
        return (text for shard in self.corpora[name].shards for text in documents(self.store, shard, split))


def compared(texts: ComparedTexts, *, keep: bool = True, report: Report = silent) -> list[SetOverlap]:
    """Return the overlap of every evaluation set, from the store or computed; `keep`: store what was computed.

    Raises `EvaluationError` for a file of questions that cannot be read.
    """
    key = texts.key
    artifact = texts.store.find(KIND, key)
    if artifact is not None:
        return [_from_json(one) for one in json.loads(texts.store.read_bytes(artifact, FILE))]
    total = sum(texts.corpora[name].documents("train") for name in texts.calibrated)
    report(f"looking for evaluation text in {total:,} documents", 0, None)
    found = overlaps(texts.evaluation(), texts.calibration, own=texts.own)
    if keep:
        provenance = {"corpora": {name: corpus.digest for name, corpus in texts.corpora.items()}}
        with texts.store.publish(KIND, key, provenance) as folder:
            (folder / FILE).write_text(json.dumps([dataclasses.asdict(one) for one in found], ensure_ascii=False))
    return found


def leak(found: Sequence[SetOverlap], allowed: bool | Collection[str]) -> EvaluationError | None:
    """Return the error that stops a run: calibration text contains more of an evaluation set than expected, and the
    plan does not allow it. Else None.

    `allowed`: true for any set, or names of corpora and tasks.
    """
    refused = [one for one in _evaluated(found) if leaks(one, found) and not is_allowed(one, allowed)]
    if not refused:
        return None
    first = refused[0].largest[0]
    others = f" (also in {', '.join(one.name for one in refused[1:])})" if refused[1:] else ""
    return EvaluationError(
        f"{counted(refused[0])} in the calibration text{others}",
        where=refused[0].name,
        got=f"{first.share:.0%} of {first.begins!r} in {first.found_in}'s {first.found_begins!r}",
        do="Remove these documents from one of the two, or name the set in evaluate.allow_leaks: [NAME], or true.",
    )


def counted(one: SetOverlap) -> str:
    """Describe a leak in words."""
    return f"{one.leaked:,} of {one.documents:,} texts occur to {LEAK_SHARE:.0%} or more"


def leaks(one: SetOverlap, found: Sequence[SetOverlap]) -> bool:
    """Whether more texts of a set are found than expected from the training documents of its corpus."""
    expected = expected_leaks(one, found)
    return one.leaked > expected + DEVIATIONS * math.sqrt(expected)


def expected_leaks(one: SetOverlap, found: Sequence[SetOverlap]) -> float:
    """Return how many texts of a set would be found if it were training text; 0 for questions."""
    corpus, _, split = one.name.rpartition(" (")
    sample = next((each for each in found if split and each.name == _name(corpus, TRAIN)), None)
    return one.documents * sample.leaked / sample.documents if sample else 0.0


def is_allowed(one: SetOverlap, allowed: bool | Collection[str]) -> bool:
    return allowed if isinstance(allowed, bool) else one.name.rpartition(" (")[0] in allowed or one.name in allowed


def as_json(found: Sequence[SetOverlap], allowed: bool | Collection[str]) -> dict[str, Any]:
    """Return a run's record of the comparison: its limits, and the result for each evaluation set."""
    sets = [
        {
            "set": one.name,
            "texts": one.documents,
            "too_short": one.too_short,
            "share_of_words": round(one.share, 4),
            "leaked": one.leaked,
            "expected": round(expected_leaks(one, found), 2),
            "is_leak": leaks(one, found),
            "is_allowed": is_allowed(one, allowed),
            "largest": [dataclasses.asdict(each) for each in one.largest[:3]],
        }
        for one in _evaluated(found)
    ]
    return {"ngram_words": NGRAM_WORDS, "leak_share": LEAK_SHARE, "most_documents": MOST_DOCUMENTS, "sets": sets}


def _evaluated(found: Sequence[SetOverlap]) -> list[SetOverlap]:
    return [one for one in found if not one.name.endswith(_name("", TRAIN))]


def _name(corpus: str, split: str) -> str:
    return f"{corpus} ({split})"


def _from_json(value: dict[str, Any]) -> SetOverlap:
    return SetOverlap(**{**value, "largest": tuple(DocumentOverlap(**one) for one in value["largest"])})
