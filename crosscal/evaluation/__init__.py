"""Evaluation of a model: perplexity on held-out windows, accuracy on questions, and summaries of both."""

from crosscal.evaluation.likelihood import perplexity, window_nll, windows_of
from crosscal.evaluation.measurement import PERPLEXITY, TEST, VALIDATION, Measurement
from crosscal.evaluation.questions import QuestionSuite
from crosscal.evaluation.summaries import paired_difference, pareto_front, spread

__all__ = [
    "PERPLEXITY",
    "TEST",
    "VALIDATION",
    "Measurement",
    "QuestionSuite",
    "paired_difference",
    "pareto_front",
    "perplexity",
    "spread",
    "window_nll",
    "windows_of",
]
