"""Faithfulness of a summary to its source, scored by a local natural-language-inference model: SummaC-ZS.

    score = mean over the summary's sentences of max over the source's sentences of P(source sentence entails it)

(arXiv 2111.09525, sentence by sentence, contradictions not counted, as in arXiv 2311.09335.) Between 0 and 1; higher is
more faithful. The model is a folder in Hugging Face format with a class named entailment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.errors import EvaluationError

MOST_PAIRS = 32
MOST_TOKENS = 512
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True, eq=False)
class Judge:
    """A natural-language-inference model with its tokenizer."""

    model: Any
    tokenizer: Any
    entailment: int
    """Index of the entailment class."""

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Judge:
        """Load the model. Raises `EvaluationError` for a folder that holds no such model."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise EvaluationError("no model of natural language inference", where=str(folder), got="no config.json")
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).to(device).eval()
        labels = {int(index): str(name).casefold() for index, name in model.config.id2label.items()}
        found = [index for index, name in labels.items() if name == "entailment"]
        if len(found) != 1:
            raise EvaluationError(
                "a model without a class called entailment", where=str(folder), got=", ".join(labels.values()),
                do="Name its classes in config.json (`id2label`).",
            )  # fmt: skip
        return cls(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), found[0])

    def score(self, source: str, summary: str) -> float:
        """Return the SummaC-ZS score of a summary; 0 if it or the source is empty."""
        premises, claims = sentences(source), sentences(summary)
        if not premises or not claims:
            return 0.0
        pairs = [(premise, claim) for claim in claims for premise in premises]
        found = [
            one for start in range(0, len(pairs), MOST_PAIRS) for one in self._entailed(pairs[start:][:MOST_PAIRS])
        ]
        rows = [found[start : start + len(premises)] for start in range(0, len(pairs), len(premises))]
        return sum(map(max, rows)) / len(rows)

    def _entailed(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        import torch

        premises, claims = ([pair[side] for pair in pairs] for side in (0, 1))
        most = min(MOST_TOKENS, getattr(self.model.config, "max_position_embeddings", MOST_TOKENS))
        encoded = self.tokenizer(
            premises, claims, padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            return self.model(**encoded).logits.float().softmax(-1)[:, self.entailment].tolist()


def sentences(text: str) -> list[str]:
    """Split after a full stop, question mark or exclamation mark, and at line ends."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def risk_ratio(dense: Sequence[float], compressed: Sequence[float], least: float = 1e-3) -> float:
    """Return the mean over documents of s_dense / s_compressed, where scores below `least` are raised to it.

    Above 1, the compressed model's summaries are less faithful. Our interpretation of the hallucination risk ratio of
    arXiv 2311.09335, whose formula is not printed. Raises ValueError on unequal or no documents.
    """
    ratios = [max(a, least) / max(b, least) for a, b in zip(dense, compressed, strict=True)]
    if not ratios:
        raise ValueError("no documents to compare on")
    return sum(ratios) / len(ratios)
