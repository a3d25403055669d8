"""How documents are chosen."""

from __future__ import annotations

from dataclasses import dataclass

DSIR, ZIP_FIT = "dsir", "zip-fit"


@dataclass(frozen=True)
class SelectionSettings:
    method: str | None = None
    """`dsir`, `zip-fit`, or None: a seeded random order, towards nothing."""

    documents: int | None = None
    """How many to choose; None: all that are not left out for another reason."""

    seed: int = 0

    near_duplicates: float | None = 0.8
    """Jaccard similarity of two documents' word 5-grams from which on they count as one; None: only equal ones do."""

    targets: int = 64
    """`zip-fit` compares with so many documents of the sample, drawn by the seed."""

    least_words: int = 100
    """`dsir` does not choose shorter documents (the default of the published code), counted as it counts words."""
