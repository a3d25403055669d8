"""Laws of measuring: once per content, whatever the folder is called, and never kept while a task is skipped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosscal.corpora import Corpus, ingest, load_corpus
from crosscal.models import ModelSource
from crosscal.stages import evaluate as stage
from crosscal.stages.evaluate import Examination, examination, measure
from crosscal.store import Store
from tests.helpers.tiny_text import SENTENCES, tiny_llama


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    tiny_llama(tmp_path / "model")
    return ModelSource.open(tmp_path / "model")


@pytest.fixture
def corpus(store: Store, tmp_path: Path) -> Corpus:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " + " ".join(SENTENCES)}) + "\n" for i in range(40)))
    ingest(store, "legal", [str(file)])
    return load_corpus(store, "legal")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": sentence, "choices": ["yes", "no"], "answer": i % 2} for i, sentence in enumerate(SENTENCES)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every loading of a model."""
    seen: list[Path] = []
    load = stage.load_variant
    monkeypatch.setattr(stage, "load_variant", lambda path, **more: seen.append(path) or load(path, **more))
    return seen


def exam(store: Store, source: ModelSource, corpus: Corpus, *tasks: str, limit: int | None = None) -> Examination:
    return examination(
        store, [corpus], source, length=32, windows=4, tasks=tasks, limit=limit, batch_tokens=64, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip


def test_the_same_weights_are_measured_once_wherever_they_lie(
    tmp_path: Path, store: Store, source: ModelSource, corpus: Corpus, questions: Path, loads: list[Path]
) -> None:
    first = measure(exam(store, source, corpus, str(questions)), source.path)
    assert {(found.corpus_or_task, found.metric) for found in first} == {
        ("legal", "perplexity"), ("questions", "acc"), ("questions", "acc_norm"),
    }  # fmt: skip
    shutil.copytree(source.path, tmp_path / "elsewhere")
    again = measure(exam(Store(store.location), source, corpus, str(questions)), tmp_path / "elsewhere")
    assert again == first
    assert len(loads) == 1


def test_whatever_a_number_depends_on_is_measured_anew(
    tmp_path: Path, store: Store, source: ModelSource, corpus: Corpus, questions: Path, loads: list[Path]
) -> None:
    base = exam(store, source, corpus)
    measure(base, source.path)
    tiny_llama(tmp_path / "other", seed=1)
    measure(base, tmp_path / "other")
    measure(replace(base, dtype=torch.float64), source.path)
    measure(replace(base, windows={"legal": base.windows["legal"][:1]}), source.path)
    asked = exam(store, source, corpus, str(questions))
    measure(asked, source.path)
    measure(exam(store, source, corpus, str(questions), limit=2), source.path)
    questions.write_text(questions.read_text().replace('"yes"', '"maybe"'))
    measure(exam(store, source, corpus, str(questions)), source.path)
    assert len(loads) == 7


def test_nothing_is_kept_while_a_task_is_skipped(
    store: Store, source: ModelSource, corpus: Corpus, loads: list[Path]
) -> None:
    whole = exam(store, source, corpus)
    unreachable = replace(
        whole, tasks=("far-away",), suite=replace(whole.suite, skipped={"far-away": "no network today"})
    )
    for _ in range(2):
        assert [found.skipped for found in measure(unreachable, source.path)] == [None, "no network today"]
    assert len(loads) == 2
    assert list(store.list("evaluations")) == []
