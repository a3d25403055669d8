"""One measured number and what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass


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
