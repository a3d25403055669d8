"""Continuation questions: exactly one choice continues the context, and the questions are deterministic."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from crosscal.corpora import ingest, load_corpus
from crosscal.errors import EvaluationError
from crosscal.evaluation.continuation import ContinuationSettings, continuation_questions
from crosscal.evaluation.question_files import Question
from crosscal.stages.continuation import continuation
from crosscal.store import Store

SETTINGS = ContinuationSettings(questions=40, choices=4, words=5, context_words=9, seed=3)


def texts(count: int = 60, *, seed: int = 0, mark: str = "w") -> list[str]:
    """Documents of 5 to 60 words of varying length; each contains the number of its document and its position."""
    draw = random.Random(seed)
    return [
        " ".join(f"{mark}{number}.{place}{'x' * draw.randrange(9)}" for place in range(draw.randint(5, 60)))
        for number in range(count)
    ]


def check(questions: list[Question], documents: list[str], settings: ContinuationSettings) -> None:
    joined = [f" {document} " for document in documents]
    for question in questions:
        assert len(question.choices) == settings.choices == len(set(question.choices))
        assert len(question.question.split()) == settings.context_words
        assert {len(choice.split()) for choice in question.choices} == {settings.words}
        follows = [
            any(f" {question.question} {choice} " in document for document in joined) for choice in question.choices
        ]
        assert [index for index, is_next in enumerate(follows) if is_next] == [question.answer]
        for choice in question.choices:
            assert any(f" {choice} " in document for document in joined)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, choices=2, words=1, context_words=1, questions=7)])
def test_the_true_words_stand_once_among_others_of_the_corpus(seed: int, settings: ContinuationSettings) -> None:
    documents = texts(seed=seed)
    found = continuation_questions(documents, replace(settings, seed=seed))
    assert len(found) == settings.questions
    assert len(set(found)) == len(found)
    check(found, documents, settings)


def test_wrong_answers_are_of_other_documents_and_about_as_long() -> None:
    found = continuation_questions(texts(200), SETTINGS)
    differences = []
    for question in found:
        of = [choice.split(".")[0] for choice in question.choices]
        assert of.count(of[question.answer]) == 1
        right = question.choices[question.answer]
        differences += [abs(len(choice) - len(right)) / len(right) for choice in question.choices]
    assert sum(differences) / len(differences) < 0.1


def test_answer_positions_are_uniform() -> None:
    found = continuation_questions(texts(400), replace(SETTINGS, questions=400))
    counts = [sum(question.answer == place for question in found) for place in range(4)]
    assert len(found) == 400
    assert max(abs(count - 100) for count in counts) < 4 * (400 * 3 / 16) ** 0.5
    longest = sum(max(q.choices, key=len) == q.choices[q.answer] for q in found)
    assert abs(longest - 100) < 4 * (400 * 3 / 16) ** 0.5  # length does not reveal the answer


def test_the_same_for_the_same_texts_in_any_order() -> None:
    documents = texts()
    found = continuation_questions(documents, SETTINGS)
    assert continuation_questions(iter(documents[::-1]), SETTINGS) == found
    assert continuation_questions(documents, replace(SETTINGS, seed=4)) != found


def test_one_document_gives_a_second_question_when_all_gave_one() -> None:
    documents = [" ".join(f"{mark}{place}" for place in range(400)) for mark in "abcdefgh"]
    found = continuation_questions(documents, replace(SETTINGS, questions=16))
    marks = [question.question[0] for question in found]
    assert sorted(marks[:8]) == sorted(marks[8:]) == list("abcdefgh")
    check(found, documents, SETTINGS)


def test_words_that_all_documents_go_on_with_are_no_wrong_answer() -> None:
    documents = [f"a{number} b{number} And so on." for number in range(30)]
    documents += [f"c{number} d{number} ends as {number}." for number in range(9)]
    settings = ContinuationSettings(questions=39, choices=3, words=3, context_words=2)
    found = continuation_questions(documents, settings)
    assert len(found) == 39
    check(found, documents, settings)
    with pytest.raises(EvaluationError, match=r"too few documents .* of documents of 5 words or more, for 3 choices"):
        continuation_questions(documents[:30], settings)
    with pytest.raises(EvaluationError, match="too few documents"):
        continuation_questions(["short"], settings)


def test_kept_by_corpus_split_and_settings_and_of_no_other_documents(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    of_split = {split: texts(30, mark=split[0]) for split in ("test", "validation")}
    for split, documents in of_split.items():
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        ingest(store, "legal", [str(file)], split=split)
    corpus, small = load_corpus(store, "legal"), replace(SETTINGS, questions=20)
    made = {split: continuation(store, corpus, split, small) for split in of_split}
    for split, documents in of_split.items():
        check(made[split], documents, small)
        assert all(question.question[0] == split[0] for question in made[split])
        assert continuation(Store(store.location), corpus, split, small) == made[split]
    assert len(list(store.list("questions"))) == 2
    continuation(store, corpus, "test", replace(small, seed=4))
    assert len(list(store.list("questions"))) == 3
    with pytest.raises(EvaluationError, match=r"legal \(train documents\): too few documents"):
        continuation(store, corpus, "train", small)
