"""Local texts and questions as tasks: measured values equal a slow reference; the identity follows the content."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from crosscal.errors import EvaluationError
from crosscal.evaluation import QuestionSuite
from crosscal.evaluation.question_files import Question
from crosscal.evaluation.tasks import LocalTask, TextTask, read_texts
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer


def slow_log_likelihood(text: str) -> float:
    model, tokenizer = tiny_llama().double(), tiny_tokenizer()
    tokens_T = torch.tensor(tokenizer(text)["input_ids"])
    with torch.no_grad():
        log_probability_TV = model(input_ids=tokens_T[None]).logits[0].log_softmax(-1)
    return sum(log_probability_TV[t - 1, tokens_T[t]].item() for t in range(1, len(tokens_T)))


def test_perplexity_by_word_and_byte_is_that_of_a_slow_reference() -> None:
    suite = QuestionSuite.load([TextTask("texts", SENTENCES)])
    found = {one.metric: one.value for one in suite.measure(tiny_llama(), tiny_tokenizer(), max_length=64)}
    total = sum(map(slow_log_likelihood, SENTENCES))
    words, size = (sum(len(measure(text)) for text in SENTENCES) for measure in (str.split, str.encode))
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)


def test_a_task_is_what_it_asks_and_not_what_it_is_called() -> None:
    one = LocalTask("a", (Question("Is it?", ("yes", "no"), 1),), told="somewhere")
    assert one.digest == LocalTask("b", one.questions, "validation").digest
    others = [
        Question("Is it?", ("yes", "no"), 0),
        Question("Is it so?", ("yes", "no"), 1),
        Question("Is it?", ("no",), 1),
    ]
    assert len({one.digest, *(LocalTask("a", (other,)).digest for other in others)}) == 4
    assert TextTask("a", ("x", "y")).digest != TextTask("a", ("xy",)).digest


def test_texts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("one", " ", "two")))
    assert read_texts(tmp_path / "rows.jsonl", "body") == ("one", "two")
    (tmp_path / "table.csv").write_text("id,body\n1,one\n2,two\n")
    assert read_texts(tmp_path / "table.csv", "body") == ("one", "two")
    (tmp_path / "whole.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "whole.txt", "text") == ("one\n\ntwo\n",)
    with pytest.raises(EvaluationError, match=r"rows\.jsonl, line 1: text is not a text .got fields body"):
        read_texts(tmp_path / "rows.jsonl", "text")
    (tmp_path / "latin.txt").write_bytes("Qu\xe9".encode("latin-1"))
    with pytest.raises(EvaluationError, match="not a text in UTF-8"):
        read_texts(tmp_path / "latin.txt", "text")
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(EvaluationError, match="no text in the file"):
        read_texts(tmp_path / "blank.txt", "text")
