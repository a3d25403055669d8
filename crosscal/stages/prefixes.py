"""Nested prefixes of a sample's calibration windows: their Hessians at a few blocks, from one calibration pass.

Moments are additive: the first half is the first quarter plus the windows between, so every window is run once. A
prefix takes the same fraction of each part of a corpus that has grown, from its beginning. Windows are in the order in
which documents were drawn, so a shorter prefix is a smaller draw. Parts that are already folded are left out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.models.sites import Site
from crosscal.models.source import ModelSource
from crosscal.models.walk import BlockMoments, walk
from crosscal.progress import Report, silent
from crosscal.stages.moments import CachedMoments
from crosscal.stages.sample import PoolPart, Sample
from crosscal.stages.spill import spill_folder
from crosscal.statistics import InputMoments, Statistic

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
HELD_OUT = "held out"
NEEDED = frozenset({Statistic.GRAM})


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The moments of one site over each prefix, shortest first, and over the held-out windows."""

    site: Site
    nested: Mapping[int, InputMoments]
    """Number of windows -> moments."""
    held_out: InputMoments


OnSite = Callable[[int, Prefixes, Mapping[str, Tensor]], None]
"""Called with a block, a site's prefixes and the block's dense parameters."""


def read_prefixes(
    cached: CachedMoments,
    source: ModelSource,
    sample: Sample,
    blocks: Sequence[int],
    on_site: OnSite,
    *,
    device: str,
    batch_tokens: int,
    report: Report = silent,
) -> int:
    """Run the model up to the last of some blocks and call `on_site` for their sites; return the tokens run. If the
    store has the moments of the whole sample at these blocks, only half of the calibration windows are run."""
    calibration, held_out = sample.calibration, sample.held_out
    pieces = pieces_of([windows_by_key(cached.store, part.key) for part in calibration.apart])
    is_read = (
        calibration.folded is None
        and held_out.folded is None
        and all(cached.has(key, block) for key in sample.sets for block in blocks)
    )
    runs = {str(windows): _by_weight(calibration.apart, piece) for windows, piece in pieces.items()}
    if is_read and len(pieces) > 1:
        del runs[str(max(pieces))]
    if not is_read:
        of_parts = [windows_by_key(cached.store, part.key) for part in held_out.apart]
        runs[HELD_OUT] = _by_weight(held_out.apart, of_parts)
    wanted = {_name(run, weight): tokens_SL for run, each in runs.items() for weight, tokens_SL in each.items()}

    def whole(parts: Sequence[PoolPart], block: int, site: Site) -> InputMoments:
        moments = (cached.read(part.key, block, site).only(NEEDED).weighted(part.weight) for part in parts)
        return functools.reduce(operator.add, moments)

    def summed(seen: BlockMoments, run: str, site: Site) -> InputMoments:
        found = {weight: seen.moments[_name(run, weight)][site.name] for weight in runs[run]}
        return functools.reduce(operator.add, (sums.only(NEEDED).weighted(weight) for weight, sums in found.items()))

    def on_block(seen: BlockMoments) -> None:
        for site in seen.sites:
            nested = dict(nested_sums({int(run): summed(seen, run, site) for run in runs if run != HELD_OUT}))
            if is_read and len(pieces) > 1:
                nested[max(pieces)] = whole(calibration.parts, seen.block, site)
            of_rest = whole(held_out.parts, seen.block, site) if is_read else summed(seen, HELD_OUT, site)
            on_site(seen.block, Prefixes(site, nested, of_rest), seen.parameters)

    dtype = getattr(torch, cached.dtype)
    done = walk(
        source,
        wanted,
        on_block=on_block,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        spill_to=spill_folder(source, wanted.values(), dtype=dtype, device=device),
        wanted=lambda block: block in blocks,
        statistics=NEEDED,
        progress=report,
    )
    return done.tokens


def pieces_of(parts: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """Return number of windows of a prefix → those of each part that the prefix before it lacks, [S, L]; prefixes that
    would be no longer than the one before are left out."""
    before, pieces = [0] * len(parts), {}
    for fraction in FRACTIONS:
        ends = [round(fraction * len(tokens_SL)) for tokens_SL in parts]
        if sum(ends) > sum(before):
            pieces[sum(ends)] = [tokens_SL[a:b] for tokens_SL, a, b in zip(parts, before, ends, strict=True)]
            before = ends
    return pieces


def _by_weight(parts: Sequence[PoolPart], windows: Sequence[Tensor]) -> dict[float, Tensor]:
    """Return weight → the windows of all parts of this weight, joined."""
    found: dict[float, list[Tensor]] = {}
    for part, tokens_SL in zip(parts, windows, strict=True):
        if len(tokens_SL):
            found.setdefault(part.weight, []).append(tokens_SL)
    return {weight: torch.cat(each) for weight, each in found.items()}


def _name(run: str, weight: float) -> str:
    return f"{run}, weight {weight}"


def nested_sums(pieces: Mapping[int, InputMoments]) -> Iterator[tuple[int, InputMoments]]:
    """Yield (windows, moments) of each prefix, shortest first, as sums over the pieces."""
    sums = None
    for windows in sorted(pieces):
        sums = pieces[windows] if sums is None else sums + pieces[windows]
        yield windows, sums
