"""Would more calibration text help? Held-out loss as a function of nested prefixes of a sample.

At the sites of two blocks one method is solved on the Hessian of an eighth, a quarter, half and all of the windows.
Every solution is measured on these and on the held-out windows. `crosscal.report.sufficiency` interprets the losses.

Shapes: O outputs, I inputs of a site.
"""

from __future__ import annotations

import dataclasses
import json
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
from crosscal.report.sufficiency import Point, expected_gain, verdict
from crosscal.stages.moments import CachedMoments
from crosscal.stages.prefixes import Prefixes, read_prefixes
from crosscal.stages.sample import Sample
from crosscal.statistics.spectrum import spectrum
from crosscal.store import digest_of

FORMAT = 2  # of stored curves; bump when something else is measured
PLAIN_FORMAT = 1
"""Of curves over sets of equal weight, none of them folded: they are the same in both formats."""
KIND = "sufficiency"
FILE = "sufficiency.json"
METHOD, SPARSITY = "sparsegpt", 0.6
"""The method whose solutions depend most on the data, at the sparsity where quality begins to suffer."""
MOST_SITES = 8
"""Per block: a mixture of experts has hundreds."""
WIDEST = 4096
"""Maximum inputs of a site whose eigenvalues are computed."""


@dataclass(frozen=True)
class SiteFacts:
    """Facts about one site, from all windows together."""

    block: int
    name: str
    inputs: int
    tokens: int
    effective_rank: float | None
    """See `Spectrum`; None for a site wider than `WIDEST`."""
    condition: float | None


@dataclass(frozen=True)
class Curve:
    """Losses of one corpus's sample by prefix, and what more text would gain."""

    corpus: str
    seed: int
    points: tuple[Point, ...]
    """Shortest prefix first."""
    matrices: int
    sites: tuple[SiteFacts, ...]
    tokens_read: int

    @property
    def last_gain(self) -> float | None:
        """Fraction by which the last doubling reduced held-out loss; None with a single prefix."""
        return 1 - self.points[-1].held_out_loss / self.points[-2].held_out_loss if len(self.points) > 1 else None

    @property
    def expected_gain(self) -> float | None:
        return expected_gain(self.points)

    @property
    def verdict(self) -> str:
        return verdict(self.expected_gain)

    def as_json(self) -> dict[str, Any]:
        told = {"last_gain": self.last_gain, "expected_gain": self.expected_gain, "verdict": self.verdict}
        return {**dataclasses.asdict(self), **told}


def sampled_blocks(blocks: int) -> list[int]:
    """Return the blocks at a quarter and at half of the depth: deeper ones take longer and give the same answer."""
    return sorted({blocks // 4, blocks // 2} & set(range(blocks)))


def sufficiency(
    cached: CachedMoments,
    source: ModelSource,
    sample: Sample,
    *,
    device: str,
    batch_tokens: int,
    report: Report = silent,
) -> Curve:
    """Return the curve of one sample; measured once, then read from the store."""
    blocks = sampled_blocks(source.blocks)
    splits = (sample.calibration, sample.held_out)
    parts = [[part.key for part in sums.parts] for sums in splits]
    is_plain = all(sums.folded is None and len({part.weight for part in sums.apart}) == 1 for sums in splits)
    format_ = PLAIN_FORMAT if is_plain else FORMAT
    key = digest_of([format_, cached.model, cached.dtype, parts, METHOD, SPARSITY, blocks])
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
    cached: CachedMoments,
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
    points = points_of(losses, sum(part.tokens for part in sample.calibration.apart))
    return Curve(sample.corpus, sample.seed, tuple(points), len(losses), tuple(sites), tokens)


def prefix_losses(
    prefixes: Prefixes, parameters: Mapping[str, Tensor], device: str
) -> list[dict[int, tuple[float, float]]] | None:
    """Return, for every matrix of a site, windows of a prefix → (loss on them, held-out loss). None if some prefix or
    the held-out windows have no usable Hessian, as when none of their tokens reached an expert."""
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
                assert answer.relative_loss is not None, "with a Hessian it is known"
                losses[matrix][windows] = answer.relative_loss, held_out
    except (StatisticsError, ZeroDivisionError):
        return None
    return list(losses.values())


def points_of(losses: Sequence[Mapping[int, tuple[float, float]]], tokens: int) -> list[Point]:
    """Return the curve of means over matrices; `tokens`: those of the longest prefix."""
    windows = sorted(losses[0]) if losses else []
    means = ([statistics.mean(each[n][kind] for each in losses) for kind in (0, 1)] for n in windows)
    return [Point(n, n * tokens // windows[-1], *pair) for n, pair in zip(windows, means, strict=True)]


def _facts(block: int, name: str, prefixes: Prefixes, device: str) -> SiteFacts:
    whole = prefixes.nested[max(prefixes.nested)]
    if whole.inputs > WIDEST:
        return SiteFacts(block, name, whole.inputs, whole.tokens, None, None)
    found = spectrum(whole.hessian_II().to(device))
    return SiteFacts(block, name, whole.inputs, whole.tokens, found.effective_rank, found.condition)
