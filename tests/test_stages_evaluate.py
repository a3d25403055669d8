"""Evaluation: each text and task is measured once per content, whatever its name and the model's folder; what was
skipped is reported and not stored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscal.corpora import Corpus, ingest, load_corpus
from crosscal.evaluation import TEST, Measurement
from crosscal.evaluation.harness import NamedTask
from crosscal.evaluation.questions import LocalTask
from crosscal.evaluation.race import looks
from crosscal.models import ModelSource
from crosscal.stages import evaluate as stage
from crosscal.stages.evaluate import EvaluationSet, checkpoint_files, evaluation_set, measure, weights_digest
from crosscal.stages.heldout_text import HeldOutText, WindowCutting, heldout_texts
from crosscal.stages.race import Race
from crosscal.store import Store
from tests.helpers.tiny_text import SENTENCES, tiny_llama


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    tiny_llama(tmp_path / "model")
    return ModelSource.open(tmp_path / "model")


@pytest.fixture
def corpus(store: Store, tmp_path: Path) -> Corpus:
    for split in ("test", "validation"):
        lines = (json.dumps({"text": f"{split} {i} " + " ".join(SENTENCES)}) + "\n" for i in range(40))
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    ingest(store, "legal", [str(tmp_path / "test.jsonl"), str(tmp_path / "validation.jsonl")])
    return load_corpus(store, "legal")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": sentence, "choices": ["yes", "no"], "answer": i % 2} for i, sentence in enumerate(SENTENCES)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths of all model loads."""
    seen: list[Path] = []
    load = stage.load_variant
    monkeypatch.setattr(stage, "load_variant", lambda path, **more: seen.append(path) or load(path, **more))
    return seen


def eval_set(
    store: Store,
    source: ModelSource,
    corpus: Corpus,
    *tasks: str,
    limit: int | None = None,
    windows: int = 4,
    validation: int = 2,
) -> EvaluationSet:
    return evaluation_set(
        store, [corpus], source, WindowCutting(32, {"test": windows, "validation": validation}), tasks=tasks,
        limit=limit, batch_tokens=64, device="cpu", dtype=torch.float32,
    )  # fmt: skip


def test_the_same_weights_are_measured_once_wherever_they_lie(
    tmp_path: Path, store: Store, source: ModelSource, corpus: Corpus, questions: Path, loads: list[Path]
) -> None:
    first = measure(eval_set(store, source, corpus, str(questions)), source.path)
    assert [(found.corpus_or_task, found.split, found.metric) for found in first] == [
        ("legal", "test", "perplexity"), ("legal", "validation", "perplexity"),
        ("questions", "test", "acc"), ("questions", "test", "acc_norm"),
    ]  # fmt: skip
    shutil.copytree(source.path, tmp_path / "elsewhere")
    again = measure(eval_set(Store(store.location), source, corpus, str(questions)), tmp_path / "elsewhere")
    assert again == first
    assert len(loads) == 1


def test_whatever_a_number_depends_on_is_measured_anew(
    tmp_path: Path, store: Store, source: ModelSource, corpus: Corpus, questions: Path, loads: list[Path]
) -> None:
    base = eval_set(store, source, corpus)
    measure(base, source.path)
    tiny_llama(tmp_path / "other", seed=1)
    measure(base, tmp_path / "other")
    measure(replace(base, dtype=torch.float64), source.path)
    measure(eval_set(store, source, corpus, windows=2), source.path)
    asked = eval_set(store, source, corpus, str(questions))
    measure(asked, source.path)
    measure(eval_set(store, source, corpus, str(questions), limit=2), source.path)
    questions.write_text(questions.read_text().replace('"yes"', '"maybe"'))
    measure(eval_set(store, source, corpus, str(questions)), source.path)
    assert len(loads) == 7


def test_what_was_skipped_is_not_kept_and_all_else_is(
    store: Store, source: ModelSource, corpus: Corpus, loads: list[Path]
) -> None:
    whole = eval_set(store, source, corpus)
    far_away = Measurement("far-away", TEST, "acc", None, None, 0, 0.0, "no network today")
    unreachable = replace(whole, suite=replace(whole.suite, skipped=(far_away,)))
    for _ in range(2):
        assert [found.skipped for found in measure(unreachable, source.path)] == [None, None, "no network today"]
    assert len(loads) == 1
    assert len(list(store.list("evaluations"))) == 2
    assert [found.skipped for found in measure(whole, source.path)] == [None, None]


def test_a_stored_task_of_lm_eval_is_found_and_reported_as_test(
    store: Store, source: ModelSource, corpus: Corpus
) -> None:
    """Earlier versions stored lm-eval's own name of the split, `validation` for many tasks."""
    whole, task = eval_set(store, source, corpus), NamedTask("hellaswag", {})
    asked = replace(whole, suite=replace(whole.suite, named=(task,)))
    asked.keep("weights", task, [Measurement("hellaswag", "validation", "acc", 0.5, 0.1, 9, 1.0)])
    found = asked.stored("weights", task) or []
    assert [(one.corpus_or_task, one.split, one.value) for one in found] == [("hellaswag", "test", 0.5)]


def test_windows_measured_look_by_look_are_in_the_order_of_the_text(
    store: Store, source: ModelSource, corpus: Corpus
) -> None:
    asked, weights = eval_set(store, source, corpus, validation=16), weights_digest(checkpoint_files(source.path))
    race = Race(asked)
    missing = race.missing(weights, 2)
    assert missing is not None
    measure(missing, source.path)
    seen = [race.seen(weights, look) for look in range(3)]
    [nll] = [found.window_nll for found in measure(asked, source.path) if found.split == "validation"]
    assert nll is not None
    for look, found in enumerate(seen):
        numbers = sorted(number for part in looks(16)[: look + 1] for number in part)
        assert found == {"legal": pytest.approx([nll[number] for number in numbers], rel=1e-5)}


def test_only_new_texts_and_tasks_are_measured(
    store: Store, source: ModelSource, corpus: Corpus, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases: a corpus under another name, another task, more windows of one text."""
    done: list[tuple[str, str]] = []
    before = EvaluationSet.keep

    def watched(self: EvaluationSet, weights: str, subject: HeldOutText | LocalTask | NamedTask, found: Any) -> Any:
        is_text = isinstance(subject, HeldOutText)
        done.append((subject.corpus, subject.split) if is_text else (subject.name, ""))
        return before(self, weights, subject, found)

    monkeypatch.setattr(EvaluationSet, "keep", watched)

    def new(asked: EvaluationSet) -> list[tuple[str, str]]:
        done.clear()
        measure(asked, source.path)
        return list(done)

    other = replace(corpus, name="law")
    assert new(eval_set(store, source, corpus)) == [("legal", "test"), ("legal", "validation")]
    assert new(eval_set(store, source, other)) == []
    assert [found.corpus_or_task for found in measure(eval_set(store, source, other), source.path)] == ["law", "law"]
    assert new(eval_set(store, source, corpus, str(questions))) == [("questions", "")]
    assert new(eval_set(store, source, corpus, windows=8)) == [("legal", "test")]
    assert new(eval_set(store, source, corpus, str(questions), windows=8)) == []


def test_windows_are_cut_once(store: Store, source: ModelSource, corpus: Corpus) -> None:
    told: list[str] = []
    cutting = WindowCutting(32, {"test": 4, "validation": 2})
    again = [heldout_texts(store, [corpus], source, cutting, lambda what, *_: told.append(what))[0] for _ in range(2)]
    assert set(told) == {"legal: reading test documents", "legal: reading validation documents"}
    assert len(told) == 80, "every document once"
    for first, second in zip(*again, strict=True):
        assert first.tokens_SL.equal(second.tokens_SL)
        assert second.tokens_SL.dtype == torch.int64
    other = heldout_texts(store, [corpus], source, replace(cutting, length=16), lambda what, *_: told.append(what))[0]
    assert len(told) == 160
    assert other[0].tokens_SL.shape == (4, 16)


def test_a_corpus_without_validation_text_is_measured_on_its_test_text_and_that_is_said(
    store: Store, source: ModelSource, tmp_path: Path
) -> None:
    file = tmp_path / "only.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " + " ".join(SENTENCES)}) + "\n" for i in range(9)))
    ingest(store, "tested", [str(file)], split="test")
    asked = eval_set(store, source, load_corpus(store, "tested"))
    assert [(text.corpus, text.split) for text in asked.texts] == [("tested", "test")]
    assert asked.notes == (
        "tested has no validation text, so it is not used for selection (0 tokens for a window of 32).",
    )
