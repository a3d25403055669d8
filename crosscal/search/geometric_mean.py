"""What is made small: the geometric mean of the losses on several corpora, Π_k E_k^(v_k), Σ v_k = 1.

It does not ask whose losses are larger by nature: halving one counts as much as halving another. Measured against the
product of perplexities in benchmarks/alpha.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def geometric_mean(losses: Sequence[float], exponents: Sequence[float]) -> float:
    """0 where one of the losses is."""
    return math.prod(loss**exponent for loss, exponent in zip(losses, exponents, strict=True))
