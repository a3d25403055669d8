"""One measured number and what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TEST, VALIDATION = "test", "validation"
"""Splits: reported numbers come from test text, every choice is made on validation text."""
PERPLEXITY = "perplexity"
ITEMS = ("window_nll", "question_correct", "document_score")
"""Fields that hold the per-item values of which a number is the mean."""


@dataclass(frozen=True)
class Measurement:
    """A number with its uncertainty, or the reason why there is none."""

    corpus_or_task: str
    split: str
    metric: str
    """`perplexity`, or the name lm-eval gives its metric: `acc`, `acc_norm`, …"""
    value: float | None
    """None exactly when `skipped` gives the reason."""
    stderr: float | None
    """Standard error of `value` over windows or questions; None where it cannot be estimated."""
    tokens: int
    """Tokens the model processed for this number."""
    seconds: float
    skipped: str | None = None
    begin_token: bool | None = None
    """Whether the model's input began with beginning-of-text; None if unknown."""
    window_nll: tuple[float, ...] | None = None
    """For a perplexity: mean negative log-likelihood per predicted token of each window, to 1e-7 nats, so that two
    models measured on the same windows can be compared window by window."""
    question_correct: tuple[bool, ...] | None = None
    """For an accuracy: whether each question was answered correctly, in the task's order, so that two models can be
    compared question by question. None for a group, and for a metric without right and wrong answers."""
    document_score: tuple[float, ...] | None = None
    """For a score of summaries: the score of each document, in the task's order, to 1e-6."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Measurement:
        items = {name: value.get(name) for name in ITEMS}
        return cls(**{**value, **{name: None if each is None else tuple(each) for name, each in items.items()}})
