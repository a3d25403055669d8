"""Questions and texts of this machine as tasks of lm-eval, handed over in memory."""

from __future__ import annotations

from typing import Any

from crosscal.evaluation.tasks import QuestionTask, TextTask

PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")
CHOSEN = ("acc", "acc_norm")


def leaves_of(asked: QuestionTask | TextTask) -> dict[str, Any]:
    """What `TaskManager.load` returns, for a task of ours."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows, config = _of_texts(asked) if isinstance(asked, TextTask) else _of_questions(asked)
    # A path would leave a copy in the user's datasets cache.
    data = {"custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_dict(rows)}), "test_split": "test"}
    task = ConfigurableTask(config={"task": asked.name, **data, **config})
    return {"tasks": {asked.name: task}, "groups": {}, "group_map": {}}


def _of_texts(asked: TextTask) -> tuple[dict[str, Any], dict[str, Any]]:
    metrics = [{"metric": name} for name in PERPLEXITIES]
    config = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    return {"text": list(asked.documents)}, config | {"metric_list": metrics}


def _of_questions(asked: QuestionTask) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = {
        "question": [question.question for question in asked.questions],
        "choices": [list(question.choices) for question in asked.questions],
        "answer": [question.answer for question in asked.questions],
    }
    config = {
        "output_type": "multiple_choice",
        # Bare field names: lm-eval would evaluate a rendered template that consists of digits.
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in CHOSEN],
    }
    return rows, config
