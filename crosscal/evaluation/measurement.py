"""One measured number and what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEST, VALIDATION = "test", "validation"
"""Splits: what is reported is measured on the first, whatever chooses reads the second."""
PERPLEXITY = "perplexity"
ITEMS = ("window_nll", "question_correct", "document_score")
"""Fields that hold what a number is the mean of."""


@dataclass(frozen=True)
class Measurement:
    """A number with its uncertainty, or the reason why there is none."""

    corpus_or_task: str
    split: str
    metric: str
    """`perplexity`, or the name lm-eval gives its metric: `acc`, `acc_norm`, …"""
    value: float | None
    """None exactly when `skipped` says why."""
    stderr: float | None
    """Standard error of `value` over windows or questions; None where it cannot be estimated."""
    tokens: int
    """Tokens the model read for this number."""
    seconds: float
    skipped: str | None = None
    begin_token: bool | None = None
    """Whether what the model read began with beginning-of-text; None where nothing says."""
    window_nll: tuple[float, ...] | None = None
    """Of a perplexity: the mean negative log-likelihood per predicted token of each window, to 1e-7 nats, so that two
    models measured on the same windows can be compared window by window."""
    question_correct: tuple[bool, ...] | None = None
    """Of an accuracy: whether each question, in the task's order, was answered right, so that two models asked the same
    questions can be compared question by question. None where a metric has no right and wrong, and for a group."""
    document_score: tuple[float, ...] | None = None
    """Of a score of summaries: that of each document, in the task's order, to 1e-6."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Measurement:
        items = {name: value.get(name) for name in ITEMS}
        return cls(**{**value, **{name: None if each is None else tuple(each) for name, each in items.items()}})
