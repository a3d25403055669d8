"""The search objective: the geometric mean of the losses on several corpora, Π_k E_k^(v_k), Σ v_k = 1.

It does not depend on the scales of the losses: at equal exponents, halving one counts as much as halving another.
benchmarks/alpha.py compares it with the product of perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def geometric_mean(losses: Sequence[float], exponents: Sequence[float]) -> float:
    """Return Π_k E_k^(v_k); 0 if a loss with a positive exponent is 0."""
    return math.prod(loss**exponent for loss, exponent in zip(losses, exponents, strict=True))
