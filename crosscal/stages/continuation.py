"""Questions that ask how a corpus's text continues, made once and stored: the same for every model and run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from crosscal.corpora import Corpus, documents
from crosscal.errors import EvaluationError
from crosscal.evaluation.continuation import ContinuationSettings, continuation_questions
from crosscal.evaluation.question_files import Question
from crosscal.store import Store, digest_of

FORMAT = 1
FILE = "questions.jsonl"


def continuation(store: Store, corpus: Corpus, split: str, settings: ContinuationSettings) -> list[Question]:
    """Return questions made from the documents of one split of a corpus. Raises `EvaluationError` naming the corpus."""
    key = question_key(corpus.digest, split, dataclasses.asdict(settings))
    artifact = store.find("questions", key)
    if artifact is not None:
        return [_question(line) for line in store.read_bytes(artifact, FILE).splitlines()]
    try:
        texts = (text for shard in corpus.shards for text in documents(store, shard, split))
        made = continuation_questions(texts, settings)
    except EvaluationError as error:
        where = f"{corpus.name} ({split} documents)"
        raise EvaluationError(error.what, where=where, got=error.got, do=error.do) from error
    told = {"corpus": corpus.name, "version": corpus.version, "split": split, **dataclasses.asdict(settings)}
    with store.publish("questions", key, told) as staged:
        lines = (json.dumps(dataclasses.asdict(question), ensure_ascii=False) + "\n" for question in made)
        (staged / FILE).write_text("".join(lines), encoding="utf-8")
    return made


def question_key(corpus: str, split: str, settings: dict[str, Any]) -> str:
    """Return the questions' key in the store; `corpus` is the corpus's digest."""
    return digest_of([FORMAT, corpus, split, settings])


def _question(line: bytes) -> Question:
    row = json.loads(line)
    return Question(**{**row, "choices": tuple(row["choices"])})
