"""Estimate from losses on calibration and on held-out windows whether there is enough calibration text.

A solution fits its own n windows better than it should by as much as it fits others worse, about c/n each (the optimism
of a fit: Efron 1986, JASA 81). Twice as many windows would therefore gain c/2n, a quarter of the gap between both
losses. This estimate is closer to the measured gain of a doubling than the gain of the last doubling is, which a single
unusual document affects (`benchmarks/sufficiency.py`). But the part of the gap that comes from held-out text of another
kind does not shrink with more data; so if shorter prefixes were solved as well (`crosscal enough`), the estimate is
limited to the average gain per doubling so far.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from crosscal.report.rows import LayerRow, ResultRow
from crosscal.report.table import mixture_text

GAIN_LIMIT = 0.02
"""Relative reduction of held-out loss below which doubling the data is not worthwhile. On the test bed a per cent of
loss is about .2 % of perplexity at 70 % sparsity."""
ENOUGH, ADD, UNKNOWN = "enough", "add data", "cannot be told"
MOST_MIXTURES = 4


@dataclass(frozen=True)
class Point:
    """Losses of solving on a prefix of the windows."""

    windows: int
    tokens: int
    loss: float
    """E‖(W − V) x‖² / E‖W x‖² on the calibration windows themselves, mean over matrices."""
    held_out_loss: float


def expected_gain(points: Sequence[Point]) -> float | None:
    """Return the relative reduction of held-out loss expected from one more doubling: a quarter of the gap, and at most
    the average per doubling so far. None with fewer than two prefixes."""
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    average = (first.held_out_loss - last.held_out_loss) / math.log2(last.windows / first.windows)
    return max(0.0, min((last.held_out_loss - last.loss) / 4, average)) / last.held_out_loss


def verdict(expected: float | None) -> str:
    """Return `enough` if a doubling would gain less than `GAIN_LIMIT`."""
    if expected is None or math.isnan(expected):
        return UNKNOWN
    return ENOUGH if expected < GAIN_LIMIT else ADD


def gap_sentences(results: Sequence[ResultRow], layers: Sequence[LayerRow]) -> list[str]:
    """Return a sentence per mixture (single corpora only, if there are any) from a run's own losses, at no cost: for
    the variant that more text would help most."""
    mixtures = {row.variant: row.mixture for row in results if row.mixture}
    gaps: dict[str, tuple[float, str]] = {}
    alone = [name for name, weights in mixtures.items() if len(weights) == 1]
    for variant in alone or mixtures:
        mine = [row for row in layers if row.variant == variant and not row.stays_dense]
        pairs = [(row.relative_loss, row.heldout_relative_loss) for row in mine]
        known = [(loss, held_out) for loss, held_out in pairs if loss is not None and held_out is not None]
        held_out = statistics.mean(held_out for _, held_out in known) if known else 0.0
        if held_out > 0:
            gain = (held_out - statistics.mean(loss for loss, _ in known)) / 4 / held_out
            text = mixture_text(mixtures[variant])
            gaps[text] = max(gaps.get(text, (0.0, variant)), (max(gain, 0.0), variant))
    return [_gap_sentence(text, *found) for text, found in list(gaps.items())[:MOST_MIXTURES]]


def _gap_sentence(mixture: str, gain: float, variant: str) -> str:
    if gain < GAIN_LIMIT:
        return f"{mixture}: enough; twice as much would change held-out loss by about {-gain:.1%} ({variant})."
    said = f"twice as much may change held-out loss by {-gain:.1%} ({variant})"
    return f"{mixture}: perhaps too little; {said}. `crosscal enough` shows how the loss falls with more text."
