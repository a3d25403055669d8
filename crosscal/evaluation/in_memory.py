"""Local texts as an lm-eval task, passed in memory."""

from __future__ import annotations

from typing import Any

from crosscal.evaluation.tasks import TextTask

PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def leaves_of(texts: TextTask) -> dict[str, Any]:
    """Return what `TaskManager.load` returns, for local texts."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    # Loading from a path would leave a copy in the user's datasets cache.
    rows = Dataset.from_dict({"text": list(texts.documents)})
    config = {
        "task": texts.name,
        "custom_dataset": lambda **_: DatasetDict({"test": rows}),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": name} for name in PERPLEXITIES],
    }
    return {"tasks": {texts.name: ConfigurableTask(config=config)}, "groups": {}, "group_map": {}}
