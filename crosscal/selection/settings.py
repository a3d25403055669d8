"""Settings of data selection."""

from __future__ import annotations

from dataclasses import dataclass

DSIR, ZIP_FIT = "dsir", "zip-fit"


@dataclass(frozen=True)
class SelectionSettings:
    method: str | None = None
    """`dsir`, `zip-fit`, or None: a seeded random order, without scores."""

    documents: int | None = None
    """How many to choose; None: all that are not rejected for another reason."""

    seed: int = 0

    near_duplicates: float | None = 0.8
    """Jaccard similarity of word 5-grams from which on two documents are duplicates; None: only equal ones are."""

    targets: int = 64
    """`zip-fit`: maximum number of documents of the sample to compare with, drawn by the seed."""

    least_words: int = 100
    """`dsir`: minimum number of words of a chosen document (the published code's default), as DSIR counts words."""
