"""Summaries: greedy decoding and scores equal plain references."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from crosscal.errors import EvaluationError
from crosscal.evaluation.faithfulness import Judge, risk_ratio, sentences
from crosscal.evaluation.summarise import SummaryTask, greedy, measure_summaries
from tests.helpers.tiny_judge import tiny_judge
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer

DOCUMENTS = tuple((" ".join(SENTENCES[i:]), SENTENCES[i]) for i in range(4))


def slow_greedy(prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy decoding without a cache: one forward pass over the whole text per token."""
    model, found = tiny_llama(), list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
        if found[-1] == 1:
            break
    return found[len(prompt) :]


@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_the_likeliest_token_each_time_in_any_batch(batch_tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer(text)["input_ids"][:9] for text in SENTENCES] + [tokenizer("The river")["input_ids"]]
    told: list[tuple[int, int]] = []
    report = lambda done, total: told.append((done, total))  # noqa: E731
    found = greedy(tiny_llama(), tokenizer, prompts, 12, batch_tokens=batch_tokens, progress=report)
    for prompt, text in zip(prompts, found, strict=True):
        wanted = tokenizer.decode(slow_greedy(prompt, 12), skip_special_tokens=True)
        assert text == wanted.strip().split("\n\n")[0].strip()
    assert told[-1] == (6, 6)


def plain_rouge_1(reference: str, summary: str) -> tuple[float, float]:
    """Return (precision, F measure) over words; a word counts as often as both texts contain it."""
    one, other = (
        ["".join(c for c in word if c.isalnum()) for word in text.lower().split()] for text in (reference, summary)
    )
    shared = sum(min(one.count(word), other.count(word)) for word in set(other))
    precision, recall = shared / len(other), shared / len(one)
    return precision, 2 * precision * recall / (precision + recall) if shared else 0.0


def test_rouge_against_the_reference_and_overlap_with_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["the river and the sea", "two tablets", "a licence for the mill", "when it rains we walk"]
    monkeypatch.setattr("crosscal.evaluation.summarise.greedy", lambda *args, **more: written)
    task = SummaryTask("papers", DOCUMENTS, new_tokens=8)
    found = {one.metric: one for one in measure_summaries(task, tiny_llama(), tiny_tokenizer(), max_length=128)}
    to_reference = [plain_rouge_1(reference, text)[1] for (_, reference), text in zip(DOCUMENTS, written, strict=True)]
    to_source = [plain_rouge_1(document, text)[0] for (document, _), text in zip(DOCUMENTS, written, strict=True)]
    assert found["rouge1"].document_score == pytest.approx(tuple(to_reference), abs=1e-6)
    assert found["overlap_rouge1"].document_score == pytest.approx(tuple(to_source), abs=1e-6)
    for one in found.values():
        assert one.document_score is not None
        assert one.value == pytest.approx(sum(one.document_score) / 4, abs=1e-6)
    assert "faithfulness" not in found


def test_a_document_too_long_loses_its_end_and_a_prompt_without_room_is_refused() -> None:
    long = tuple((document * 9, reference) for document, reference in DOCUMENTS)
    found = measure_summaries(SummaryTask("papers", long, new_tokens=8), tiny_llama(), tiny_tokenizer(), max_length=48)
    assert found[0].tokens <= 4 * 40
    with pytest.raises(EvaluationError, match="papers: no room for a document"):
        measure_summaries(SummaryTask("papers", long, new_tokens=40), tiny_llama(), tiny_tokenizer(), max_length=48)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_judge(tmp_path_factory.mktemp("judge"))


def test_faithfulness_is_the_mean_of_the_best_entailments(judge_folder: Path) -> None:
    judge = Judge.open(judge_folder)
    source, summary = " ".join(SENTENCES), "It rains. A doctor walks! Is it true"
    assert sentences(summary) == ["It rains.", "A doctor walks!", "Is it true"]
    best = []
    for claim in sentences(summary):
        alone = []
        for premise in SENTENCES:
            encoded = judge.tokenizer(premise, claim, return_tensors="pt")
            with torch.no_grad():
                logits_C = judge.model(**encoded).logits[0].double()
            alone.append(math.exp(logits_C[2]) / sum(math.exp(value) for value in logits_C))
        best.append(max(alone))
    assert judge.score(source, summary) == pytest.approx(sum(best) / 3, rel=1e-4)
    assert judge.score(source, " ") == 0.0


def test_a_judge_is_asked_where_one_is_named(judge_folder: Path) -> None:
    task = SummaryTask("papers", DOCUMENTS, new_tokens=8, judge=str(judge_folder))
    found = {one.metric: one for one in measure_summaries(task, tiny_llama(), tiny_tokenizer(), max_length=128)}
    scores = found["faithfulness"].document_score
    assert scores is not None
    assert all(0 <= score <= 1 for score in scores)
    with pytest.raises(EvaluationError, match="no model of natural language inference"):
        Judge.open(judge_folder / "nowhere")
    (judge_folder / "config.json").write_text((judge_folder / "config.json").read_text().replace("ENTAILMENT", "yes"))
    with pytest.raises(EvaluationError, match="without a class called entailment"):
        Judge.open(judge_folder)


def test_the_ratio_of_risks() -> None:
    assert risk_ratio([0.5, 0.8], [0.5, 0.8]) == 1
    assert risk_ratio([0.9, 0.8], [0.45, 0.4]) == pytest.approx(2)
    assert risk_ratio([0.5], [0.0]) == pytest.approx(500)
    assert risk_ratio([0.2, 0.4], [0.4, 0.2]) == pytest.approx((0.5 + 2) / 2)
    with pytest.raises(ValueError, match="no documents"):
        risk_ratio([], [])
