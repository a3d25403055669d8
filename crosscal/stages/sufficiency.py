"""Is there enough calibration text, or does more of it help? Held-out loss as nested prefixes of a sample grow.

At the sites of two blocks one method is solved on the Hessian of an eighth, a quarter, half and all of the windows, and
every answer is measured on the held-out windows. What the last doubling brought says what the next one would bring: the
part of the loss that is due to too little data falls like 1/n, so that each doubling brings half of the one before.

Shapes: O outputs, I inputs of a site.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crosscal.compressors import COMPRESSORS, LayerProblem, quadratic_loss
from crosscal.compressors.recipe import solve_many
from crosscal.errors import StatisticsError
from crosscal.models.sites import MatrixRef
from crosscal.models.source import ModelSource
from crosscal.progress import Report, silent
from crosscal.stages.moments import Cached
from crosscal.stages.prefixes import Prefixes, read_prefixes
from crosscal.stages.sample import Sample
from crosscal.statistics.spectrum import spectrum
from crosscal.store import digest_of

FORMAT = 1  # of stored curves; a change of what is measured makes new keys
KIND = "sufficiency"
FILE = "sufficiency.json"
METHOD, SPARSITY = "sparsegpt", 0.6
"""What is solved: the method whose answers depend most on the data, at the sparsity where it begins to hurt."""
GAIN_LIMIT = 0.02
"""Of held-out loss, that doubling the data would bring: less is not worth it. A per cent of loss is about .2 % of
perplexity at 70 % sparsity, .1 % at 60 %."""
MOST_SITES = 8
"""Of a block: a mixture of experts has hundreds."""
WIDEST = 4096
"""Inputs of a site whose eigenvalues are computed."""
ENOUGH, ADD, UNKNOWN = "enough", "add data", "cannot be told"


@dataclass(frozen=True)
class Point:
    windows: int
    tokens: int
    loss: float
    """E‖(W − V) x‖² / E‖W x‖² on the calibration windows themselves, mean over matrices."""
    held_out_loss: float


@dataclass(frozen=True)
class SiteFacts:
    """What all windows together say of one site."""

    block: int
    name: str
    inputs: int
    tokens: int
    effective_rank: float | None
    """See `Spectrum`; None for a site that is too wide."""
    condition: float | None


@dataclass(frozen=True)
class Curve:
    """What one corpus's data is worth."""

    corpus: str
    seed: int
    points: tuple[Point, ...]
    """Shortest prefix first."""
    matrices: int
    gain: float | None
    """Of held-out loss, that the last doubling brought: 1 - E(all) / E(half); None for a single window."""
    gain_error: float | None
    """Its standard error over the matrices."""
    sites: tuple[SiteFacts, ...]
    tokens_read: int

    @property
    def expected_gain(self) -> float | None:
        """Of one more doubling."""
        return None if self.gain is None else self.gain / 2

    @property
    def verdict(self) -> str:
        return verdict(self.gain)

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "expected_gain": self.expected_gain, "verdict": self.verdict}


def verdict(gain: float | None) -> str:
    """`enough` if the next doubling would bring less than `GAIN_LIMIT`, the last one having brought `gain`."""
    if gain is None or math.isnan(gain):
        return UNKNOWN
    return ENOUGH if gain / 2 < GAIN_LIMIT else ADD


def sampled_blocks(blocks: int) -> list[int]:
    """A quarter of the way into the model and halfway: what lies deeper takes longer to reach, and says the same."""
    return sorted({blocks // 4, blocks // 2} & set(range(blocks)))


def sufficiency(
    cached: Cached,
    source: ModelSource,
    sample: Sample,
    *,
    device: str,
    batch_tokens: int,
    report: Report = silent,
) -> Curve:
    """The curve of one sample; what was measured before is found in the store."""
    blocks = sampled_blocks(source.blocks)
    parts = [[part.key for part in sums.parts] for sums in (sample.calibration, sample.held_out)]
    key = digest_of([FORMAT, cached.model, cached.dtype, parts, METHOD, SPARSITY, blocks])
    artifact = cached.store.find(KIND, key)
    if artifact is None:
        curve = _measured(cached, source, sample, blocks, device=device, batch_tokens=batch_tokens, report=report)
        with cached.store.publish(KIND, key, {"model": cached.model, "calibration": sample.calibration.key}) as folder:
            (folder / FILE).write_text(json.dumps(dataclasses.asdict(curve)))
        return curve
    stored = json.loads(cached.store.read_bytes(artifact, FILE))
    points, sites = (Point(**one) for one in stored["points"]), (SiteFacts(**one) for one in stored["sites"])
    named = {"corpus": sample.corpus, "points": tuple(points), "sites": tuple(sites), "tokens_read": 0}
    return Curve(**{**stored, **named})


def _measured(
    cached: Cached,
    source: ModelSource,
    sample: Sample,
    blocks: Sequence[int],
    *,
    device: str,
    batch_tokens: int,
    report: Report,
) -> Curve:
    losses: list[dict[int, tuple[float, float]]] = []
    sites: list[SiteFacts] = []

    def on_site(block: int, prefixes: Prefixes, parameters: Mapping[str, Tensor]) -> None:
        of_block = sum(site.block == block for site in sites)
        found = prefix_losses(prefixes, parameters, device) if of_block < MOST_SITES else None
        if found is not None:
            losses.extend(found)
            sites.append(_facts(block, f"{source.block_name(block)}.{prefixes.site.name}", prefixes, device))

    options = {"device": device, "batch_tokens": batch_tokens}
    tokens = read_prefixes(cached, source, sample, blocks, on_site, **options, report=report)
    windows = sorted(losses[0]) if losses else []
    length = sample.calibration.tokens // max(windows, default=1)
    points = [
        Point(n, n * length, *(statistics.mean(each[n][kind] for each in losses) for kind in (0, 1))) for n in windows
    ]
    gain, error = last_gain([[each[n][1] for n in windows] for each in losses])
    return Curve(sample.corpus, sample.seed, tuple(points), len(losses), gain, error, tuple(sites), tokens)


def prefix_losses(
    prefixes: Prefixes, parameters: Mapping[str, Tensor], device: str
) -> list[dict[int, tuple[float, float]]] | None:
    """Of every matrix of a site: windows of a prefix → (loss on them, held-out loss). None where some prefix, or the
    held-out windows, cannot be solved on: an expert that no token of theirs came by."""
    step = COMPRESSORS[METHOD](sparsity=SPARSITY)
    weights = {
        matrix: matrix.weight_OI(parameters).to(device, prefixes.held_out.gram_II.dtype)
        for matrix in prefixes.site.matrices
    }
    losses: dict[MatrixRef, dict[int, tuple[float, float]]] = {matrix: {} for matrix in weights}
    try:
        held_out_II = prefixes.held_out.hessian_II().to(device)
        for windows, moments in prefixes.nested.items():
            hessian_II = moments.hessian_II().to(device)
            problems = [LayerProblem(m.name, weight_OI, hessian_II) for m, weight_OI in weights.items()]
            for problem, matrix, answer in zip(problems, weights, solve_many(problems, [step])[0], strict=True):
                change_OI = problem.weight_OI - answer.weight_OI
                held_out = quadratic_loss(change_OI, held_out_II) / quadratic_loss(problem.weight_OI, held_out_II)
                losses[matrix][windows] = answer.relative_loss, held_out
    except (StatisticsError, ZeroDivisionError):
        return None
    return list(losses.values())


def last_gain(losses: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Of held-out losses [matrix][prefix]: what the last doubling brought of their mean, and its standard error over
    the matrices, by the delta method for a ratio of means."""
    if not losses or len(losses[0]) < 2:
        return None, None
    half, whole = [each[-2] for each in losses], [each[-1] for each in losses]
    ratio = statistics.mean(whole) / statistics.mean(half)
    if len(losses) < 2:
        return 1 - ratio, None
    rest = [w - ratio * h for w, h in zip(whole, half, strict=True)]
    return 1 - ratio, statistics.stdev(rest) / math.sqrt(len(rest)) / statistics.mean(half)


def _facts(block: int, name: str, prefixes: Prefixes, device: str) -> SiteFacts:
    whole = prefixes.nested[max(prefixes.nested)]
    if whole.inputs > WIDEST:
        return SiteFacts(block, name, whole.inputs, whole.tokens, None, None)
    found = spectrum(whole.hessian_II().to(device))
    return SiteFacts(block, name, whole.inputs, whole.tokens, found.effective_rank, found.condition)
