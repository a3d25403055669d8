"""Questions: accuracies equal those of a slow reference; damaged or missing data is reported."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import zstandard

from crosscal.errors import EvaluationError
from crosscal.evaluation import TEST, Measurement, QuestionSuite
from crosscal.evaluation.harness import NamedTask, _check_known, _metrics, measure_named
from crosscal.evaluation.question_files import Question, read_questions, task_names
from tests.helpers.processes import modules_after
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer

WORDS = [word.strip(".,") for sentence in SENTENCES for word in sentence.split()]


def rows(count: int = 30) -> list[dict]:
    return [
        {
            "question": " ".join(WORDS[i : i + 5 + i % 4]) if i else "42",  # a number must stay text
            "choices": [WORDS[(i * 7 + j * 11) % len(WORDS)] + " " * j + "so" * (j % 2) for j in range(2 + i % 3)],
            "answer": i % 2,
            "id": i,
        }
        for i in range(count)
    ]


def question_file(path: Path, content: list[dict] | None = None) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in content or rows()).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    elif path.suffix == ".zst":
        lines = zstandard.compress(lines)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lines)
    return str(path)


def slow_accuracies(questions: list[dict], *, begin: bool = True) -> tuple[float, float]:
    """Return (acc, acc_norm), with one float64 forward pass per choice over the tokenizer's encoding."""
    model, tokenizer = tiny_llama().double(), tiny_tokenizer(begin=begin)
    right, right_by_length = 0, 0
    for row in questions:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            tokens_T = torch.tensor(tokenizer(f"{row['question']} {choice}")["input_ids"])
            with torch.no_grad():
                log_probability_TV = model(input_ids=tokens_T[None]).logits[0].log_softmax(-1)
            scores.append(
                sum(log_probability_TV[t - 1, tokens_T[t]].item() for t in range(len(context), len(tokens_T)))
            )
        lengths = [len(choice) for choice in row["choices"]]
        by_length = [score / length for score, length in zip(scores, lengths, strict=True)]
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
        right_by_length += max(range(len(scores)), key=by_length.__getitem__) == row["answer"]
    return right / len(questions), right_by_length / len(questions)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_accuracy_equals_scoring_by_hand(tmp_path: Path, suffix: str) -> None:
    suite = QuestionSuite.load([question_file(tmp_path / f"facts{suffix}")])
    found = {m.metric: m for m in suite.measure(tiny_llama(), tiny_tokenizer(), max_length=128, batch_tokens=64)}
    acc, acc_norm = slow_accuracies(rows())
    assert set(found) == {"acc", "acc_norm"}
    assert (found["acc"].value, found["acc_norm"].value) == pytest.approx((acc, acc_norm))
    assert found["acc"].stderr == pytest.approx(math.sqrt(acc * (1 - acc) / 29))
    assert found["acc"].corpus_or_task == "facts"
    assert found["acc"].tokens > 30
    for metric in found.values():
        correct = metric.question_correct
        assert correct is not None
        assert len(correct) == 30
        assert sum(correct) / 30 == metric.value
        assert Measurement.from_json(json.loads(json.dumps(asdict(metric)))) == metric


@pytest.mark.parametrize("begin", [False, True])
def test_questions_begin_as_the_tokenizers_texts_do(tmp_path: Path, begin: bool) -> None:
    suite = QuestionSuite.load([question_file(tmp_path / "facts.jsonl")])
    found = {m.metric: m.value for m in suite.measure(tiny_llama(), tiny_tokenizer(begin=begin), max_length=128)}
    assert (found["acc"], found["acc_norm"]) == pytest.approx(slow_accuracies(rows(), begin=begin))


def test_one_suite_serves_many_models(tmp_path: Path) -> None:
    suite = QuestionSuite.load([question_file(tmp_path / "facts.jsonl")])
    first, second = tiny_llama(seed=0), tiny_llama(seed=3)
    values = [
        [m.value for m in suite.measure(model, tiny_tokenizer(), max_length=128)] for model in (first, second, first)
    ]
    assert values[0] == values[2]
    assert values[0] != values[1]


def test_limit_takes_the_first_questions(tmp_path: Path) -> None:
    suite = QuestionSuite.load([question_file(tmp_path / "facts.jsonl")], limit=7)
    found = suite.measure(tiny_llama(), tiny_tokenizer(), max_length=128)
    assert found[0].value == pytest.approx(slow_accuracies(rows()[:7])[0])


def as_lm_eval_task(name: str, questions: list[dict], split: str = "test") -> NamedTask:
    """Return the questions as an lm-eval task."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict(
            {split: Dataset.from_list([{**row, "question": str(row["question"])} for row in questions])}
        ),
        f"{split}_split": split,
        "output_type": "multiple_choice",
        # Bare field names: lm-eval would evaluate a rendered template that consists of digits.
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    return NamedTask(name, {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}, "group_map": {}})


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_task_of_lm_eval_is_reported_whatever_it_calls_its_split(split: str) -> None:
    """hellaswag, piqa, winogrande and others have answers for `validation` alone; nothing is chosen by them."""
    asked = as_lm_eval_task("facts", rows(8), split)
    found = measure_named(asked, tiny_llama(), tiny_tokenizer(), limit=None, max_length=128)
    assert [(one.metric, one.split) for one in found] == [("acc", TEST), ("acc_norm", TEST)]


def test_lm_eval_is_quiet_and_left_as_it_was(capfd: pytest.CaptureFixture, caplog) -> None:
    from lm_eval.api import task
    from tqdm import tqdm

    before = logging.getLogger("lm_eval").level
    asked = as_lm_eval_task("facts", rows())
    capfd.readouterr(), caplog.clear()
    measure_named(asked, tiny_llama(), tiny_tokenizer(), limit=None, max_length=128)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert task.tqdm is tqdm
    assert logging.getLogger("lm_eval").level == before


def test_lm_eval_is_not_imported_for_files(tmp_path: Path) -> None:
    asked = functools.partial(ask, question_file(tmp_path / "facts.jsonl"))
    assert not {"lm_eval", "datasets"} & modules_after(asked)


def ask(path: str) -> None:
    QuestionSuite.load([path]).measure(tiny_llama(), tiny_tokenizer(), max_length=64)


@pytest.mark.slow  # loads the index of lm-eval's tasks
def test_a_task_out_of_reach_is_skipped_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def out_of_reach(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    suite = QuestionSuite.load([question_file(tmp_path / "facts.jsonl"), "arc_easy", "wikitext"])
    found = suite.measure(tiny_llama(), tiny_tokenizer(), max_length=128)
    assert [(m.corpus_or_task, m.metric, m.value is None) for m in found] == [
        ("facts", "acc", False),
        ("facts", "acc_norm", False),
        ("arc_easy", "acc", True),
        ("wikitext", "word_perplexity", True),
    ]
    assert found[-1].skipped == "ConnectionError: Couldn't reach the Hub"


def test_an_unknown_task_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(EvaluationError, match="arc_esy: neither an lm-eval task nor a file") as error:
        _check_known("arc_esy", {"arc_easy": None, "piqa": None})
    assert "arc_easy" in error.value.do


def test_prompts_too_long_lose_their_beginning_and_are_counted(tmp_path: Path, caplog) -> None:
    long = {"question": "the river " * 40, "choices": ["sea", "mill"], "answer": 0}
    suite = QuestionSuite.load([question_file(tmp_path / "facts.jsonl", [long, *rows(3)])])
    with caplog.at_level(logging.WARNING):
        found = suite.measure(tiny_llama(), tiny_tokenizer(), max_length=64)
    assert found[0].value is not None
    assert "facts: 2 of 11 prompts lose their beginning to fit 64 tokens" in caplog.text


def test_an_answer_too_long_is_an_error(tmp_path: Path) -> None:
    long = {"question": "the river", "choices": ["sea", "mill " * 80], "answer": 0}
    suite = QuestionSuite.load([question_file(tmp_path / "facts.jsonl", [long])])
    with pytest.raises(EvaluationError, match="facts, question 0: an answer is longer than the model's window"):
        suite.measure(tiny_llama(), tiny_tokenizer(), max_length=64)


GOOD = '{"question": "Is it?", "choices": ["yes", "no"], "answer": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "a row that is not an object"),
        ('{"question": "Is it?", "choices": ["yes", "no"]}', "a row without answer"),
        ('{"question": 3, "choices": ["yes", "no"], "answer": 1}', "question is not a text"),
        ('{"question": " ", "choices": ["yes", "no"], "answer": 1}', "question is not a text"),
        ('{"question": "Is it?", "choices": ["yes"], "answer": 0}', "choices is not a list of two or more texts"),
        ('{"question": "Is it?", "choices": ["yes", ""], "answer": 0}', "choices is not a list of two or more texts"),
        ('{"question": "Is it?", "choices": "yes", "answer": 0}', "choices is not a list of two or more texts"),
        ('{"question": "Is it?", "choices": ["yes", "no"], "answer": 2}', "not an index into the 2 choices"),
        ('{"question": "Is it?", "choices": ["yes", "no"], "answer": -1}', "not an index into the 2 choices"),
        ('{"question": "Is it?", "choices": ["yes", "no"], "answer": true}', "not an index into the 2 choices"),
        ('{"question": "Is it?", "choices": ["yes", "no"], "answer": "A"}', "not an index into the 2 choices"),
        ('{"question": "\\ud800", "choices": ["yes", "no"], "answer": 0}', "not a line of JSON in UTF-8"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(GOOD + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=f"facts.jsonl, line 3: .*{message}"):
        read_questions(path)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n\n")
    with pytest.raises(EvaluationError, match="no questions"):
        read_questions(empty)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(GOOD.replace("Is", "\xcfs").encode("latin-1"))
    with pytest.raises(EvaluationError, match="line 1: not a line of JSON in UTF-8"):
        read_questions(latin)
    for name in ("plain.jsonl.zst", "plain.jsonl.gz"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
        with pytest.raises(EvaluationError, match="cannot be read"):
            read_questions(tmp_path / name)
    for name in ("cut.jsonl.gz", "cut.jsonl.zst"):
        path = Path(question_file(tmp_path / name, rows(200)))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(EvaluationError, match=r"cut\.jsonl"):
            read_questions(path)


def test_questions_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    assert read_questions(path) == [Question("Is it?", ("yes", "no"), 1)]


def test_names_of_files() -> None:
    paths = ["law/facts.jsonl.zst", "medicine/facts.jsonl", "x/other.jsonl.gz"]
    assert list(task_names(paths).values()) == ["law_facts", "medicine_facts", "other"]
    with pytest.raises(EvaluationError, match="same name"):
        task_names(["a/law/facts.jsonl", "b/law/facts.jsonl.zst"])


def test_rows_of_lm_eval() -> None:
    row = {
        "alias": "arc",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact_match,strict": 1,
        "exact_match_stderr,strict": 0.25,
        "f1,none": "N/A",
    }
    assert list(_metrics("arc", row)) == [("acc", 0.5, None), ("exact_match,strict", 1.0, 0.25)]
    with pytest.raises(EvaluationError, match="arc: the result of a task is not finite"):
        list(_metrics("arc", {"acc,none": math.nan}))


def test_a_group_is_told_by_its_mean_or_by_its_tasks() -> None:
    from lm_eval.api.group import AggMetricConfig, Group

    loaded = [as_lm_eval_task(name, rows()) for name in ("law", "medicine")]
    leaves = {name: task for each in loaded for name, task in each.leaves["tasks"].items()}
    for aggregate, names in ((None, ["law", "medicine"]), ([AggMetricConfig(metric="acc")], ["facts"])):
        group = Group(name="facts", aggregate_metric_list=aggregate)
        for task in leaves.values():
            group.add(task)
        parts = {"tasks": leaves, "groups": {"facts": group}, "group_map": {"facts": [*leaves]}}
        suite = QuestionSuite((), (NamedTask("facts", parts),), ())
        found = suite.measure(tiny_llama(), tiny_tokenizer(), max_length=128)
        assert list(dict.fromkeys(m.corpus_or_task for m in found)) == names
        assert all((m.question_correct is None) == (m.corpus_or_task == "facts") for m in found)
