"""Multiple choice: scores with one shared pass over the question equal those of one pass per choice, and
lm-eval's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from crosscal.evaluation import QuestionSuite, choices
from crosscal.evaluation.batches import read_each
from crosscal.evaluation.choices import Choices, grouped, is_shared
from crosscal.evaluation.encoded import EncodedQuestion, encoded
from crosscal.evaluation.harness import measure_named
from crosscal.evaluation.logits import reading
from crosscal.evaluation.question_files import Question
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource
from tests.helpers.tiny_models import FAMILIES, VOCABULARY, load_plain, save_model
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer
from tests.test_evaluation_questions import as_lm_eval_task, question_file

DEMO = Path(__file__).parents[1] / "data" / "demo"
WORDS = " ".join(SENTENCES).split()


def questions(count: int, longest: int, *, seed: int = 0) -> list[EncodedQuestion]:
    chance = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(chance.choices(range(3, VOCABULARY), k=chance.randint(1, most)))

    made = []
    for _ in range(count):
        choices = tuple(tokens(4) for _ in range(chance.randint(2, 5)))
        made.append(EncodedQuestion(tokens(longest), choices, tuple(map(len, choices)), 0))
    return made


def slow_scores(model, asked: EncodedQuestion) -> list[float]:
    """Score each choice by its own forward pass in float64."""
    found = []
    for choice in asked.choices:
        tokens_T = torch.tensor((*asked.context, *choice))
        with torch.no_grad():
            log_p_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0].log_softmax(-1)
        places = range(len(asked.context) - 1, len(tokens_T) - 1)
        found.append(sum(log_p_TV[t, tokens_T[t + 1]].item() for t in places))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_questions_have_the_likelihoods_of_each_choice_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = save_model(family, tmp_path / "model"), questions(9, 30)
    plain, model = load_plain(folder), load_variant(folder)
    expected = [slow_scores(plain, one) for one in asked]
    with reading(model, torch.tensor([3, 4])) as reader:
        assert is_shared(reader, max(asked, key=lambda one: len(one.context)))
    for copies in (2**28, 1):  # all rows at once, then one at a time
        monkeypatch.setattr(choices, "CACHE_BYTES", copies)
        ((answers, _),) = read_each(model, [Choices("facts", asked)], device="cpu", batch_tokens=128)
        found = {number: scores for answer in answers for number, scores in answer.items()}
        for number, scores in enumerate(expected):
            assert found[number] == pytest.approx(scores, rel=1e-4), (family, copies, number)
    assert "forward" not in vars(model.get_decoder())


def test_a_model_whose_cache_is_wrong_reads_every_choice_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_llama(), questions(6, 30)
    expected = [slow_scores(tiny_llama().double(), one) for one in asked]
    plain = model.model.forward

    def forgetful(*args: object, past_key_values: object = None, **more: object) -> object:
        return plain(*args, **more)

    monkeypatch.setattr(model.model, "forward", forgetful)
    with reading(model, torch.tensor([3, 4])) as reader:
        assert not is_shared(reader, max(asked, key=lambda one: len(one.context)))
    assert model.model.forward is forgetful, "it is as it was"
    ((answers, _),) = read_each(model, [Choices("facts", asked)], device="cpu", batch_tokens=128)
    found = {number: scores for answer in answers for number, scores in answer.items()}
    assert [list(found[number]) for number in range(6)] == [pytest.approx(each, rel=1e-4) for each in expected]


@pytest.mark.parametrize("seed", range(50))
def test_every_question_is_read_once_and_few_tokens_at_once(seed: int) -> None:
    asked = questions(40, 60, seed=seed)
    for shared in (True, False):
        groups = grouped(asked, 256, shared=shared)
        assert sorted(number for group in groups for number in group) == list(range(40))
        for group in groups:
            together = choices._pass_tokens([asked[number] for number in group], shared)
            assert together <= 256 or len(group) == 1


@pytest.mark.parametrize("task", ["general_facts", "biomedical_facts", "legal_facts"])
def test_the_demos_answers_are_lm_evals(task: str) -> None:
    path = DEMO / "tasks" / f"{task}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    model, tokenizer = load_variant(DEMO / "model"), ModelSource.open(DEMO / "model").tokenizer()
    expected = measure_named(as_lm_eval_task(task, rows), model, tokenizer, limit=30, max_length=256)
    found = QuestionSuite.load([str(path)], limit=30).measure(model, tokenizer, max_length=256)
    for metric in ("acc", "acc_norm"):
        ours, theirs = (next(one for one in each if one.metric == metric) for each in (found, expected))
        assert (ours.value, ours.stderr) == pytest.approx((theirs.value, theirs.stderr))
        assert ours.question_correct == theirs.question_correct


def test_answers_about_long_contexts_are_lm_evals(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [
        {
            "question": " ".join(chance.choices(WORDS, k=chance.randint(20, 45))) + " " * (i % 3),
            "choices": [" ".join(chance.choices(WORDS, k=1 + (i + j) % 3)) for j in range(3)],
            "answer": i % 3,
        }
        for i in range(24)
    ]
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    expected = measure_named(as_lm_eval_task("long", rows), model, tokenizer, limit=None, max_length=128)
    found = QuestionSuite.load([question_file(tmp_path / "long.jsonl", rows)]).measure(model, tokenizer, max_length=128)
    assert [one.question_correct for one in found] == [one.question_correct for one in expected]


def test_a_question_that_is_too_long_loses_its_beginning_for_all_choices_alike() -> None:
    tokenizer = tiny_tokenizer()
    long = Question("the river " * 40, ("sea", "the mill by the sea"), 0)
    (found,) = encoded([long], tokenizer, name="facts", max_length=32)
    whole = tokenizer(long.question.rstrip())["input_ids"]
    assert found.context[0] == whole[0] == tokenizer.bos_token_id
    assert list(found.context[1:]) == whole[-(len(found.context) - 1) :]
    assert len(found.context) + max(map(len, found.choices)) - 1 == 32
