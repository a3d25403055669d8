"""crosscal's side of a comparison, through the product's own stages: `run_crosscal.py JOB`.

The store is empty at the start. Held-out windows are read and every layer's held-out loss is measured, as in every run
of crosscal; the peers do neither. `again` in the job solves further sparsities afterwards, on the stored moments.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from job import Clock, answer, bytes_below, peak_mib, read_job, windows

from crosscal.calibration.sets import stored_windows
from crosscal.compressors import LayerProblem, solve_many
from crosscal.lanes import side_by_side
from crosscal.models import ModelSource
from crosscal.plan import parse_plan
from crosscal.progress import silent
from crosscal.stages.compress import Workshop, compress_blocks, compress_sequential, publish_variants
from crosscal.stages.moments import DENSE, Cached, collect_moments
from crosscal.stages.sample import Part, Sample, Sums, over_sets
from crosscal.statistics import Mixture, factor
from crosscal.store import Store, digest_of
from crosscal.variants import Variant, variants

BATCH_TOKENS = 4096  # the plan's default


def stored(store: Store, corpus: str, tokens_SL: torch.Tensor) -> str:
    provenance = {"benchmark": corpus}
    stored_windows(store, provenance, lambda: tokens_SL)
    return digest_of(provenance)


def sample(store: Store, corpus: str, tokens_SL: torch.Tensor, held_out_SL: torch.Tensor) -> Sample:
    calibration, held_out = stored(store, corpus, tokens_SL), stored(store, f"{corpus} held out", held_out_SL)
    sums = (Sums((Part(key, set_SL.numel()),)) for key, set_SL in ((calibration, tokens_SL), (held_out, held_out_SL)))
    return Sample(corpus, 0, *sums)


def samples(store: Store, job: dict[str, Any]) -> dict[tuple[str, int], Sample]:
    """Each corpus has an equal part of the windows, so that all of them together are what a peer reads."""
    calibration_SL, held_out_SL = windows(job, "calibration"), windows(job, "held_out")
    by_default = max(len(calibration_SL) // 8, len(job["corpora"]))  # a plan's share
    held_out_SL = held_out_SL[: job["held_out"] or by_default]
    parts = zip(
        job["corpora"],
        calibration_SL.chunk(len(job["corpora"])),
        held_out_SL.chunk(len(job["corpora"])),
        strict=True,
    )
    return {(corpus, 0): sample(store, corpus, tokens_SL, held_out_SL) for corpus, tokens_SL, held_out_SL in parts}


def planned(job: dict[str, Any], compress: Sequence[dict[str, Any]]) -> list[Variant]:
    corpora = dict.fromkeys(job["corpora"], job["windows"])
    return variants(parse_plan({"model": job["model"], "corpora": corpora, "compress": list(compress)}))


def solve(shop: Workshop, wanted: Sequence[Variant]) -> None:
    compress_blocks(shop, range(shop.source.blocks), wanted)


def solve_alone(shop: Workshop, wanted: Sequence[Variant]) -> None:
    """What a peer's solve is, from the store instead of memory: read, factor and solve, with losses on the calibration
    set; the held-out ones are left out, and the answers let go. The variants share mixture and damping."""
    blocks = [partial(solve_block_alone, shop, block, wanted) for block in range(shop.source.blocks)]
    side_by_side(blocks)


def solve_block_alone(shop: Workshop, block: int, wanted: Sequence[Variant]) -> None:
    parameters, mixture = shop.source.load_block(block), wanted[0].mixture
    assert mixture is not None
    sets = over_sets(mixture, {corpus: drawn for (corpus, _), drawn in shop.samples.items()})
    for site in shop.cached.sites(block) or ():
        moments = {key: shop.cached.read(key, block, site) for key in sets.corpora}
        hessian_II = sets.hessian_II(moments)
        shared = factor(hessian_II, wanted[0].setting["damping"])
        problems = [
            LayerProblem(matrix.name, matrix.weight_OI(parameters), hessian_II, shared_factor=shared)
            for matrix in site.matrices
        ]
        solve_many(problems, [variant.compressor for variant in wanted])


def run(job: dict[str, Any], folder: Path, clock: Clock) -> Workshop:
    source, store = ModelSource.open(job["model"]), Store(folder / "store")
    cached = Cached(store, source.digest, DENSE, "float32")
    drawn = samples(store, job)
    shop = Workshop(folder / "run", source, cached, drawn, Mixture.of({job["corpora"][0]: 1.0}), "cpu")
    wanted = planned(job, job["compress"])
    if wanted[0].upstream == "sequential":
        with clock.stage("moments and solve"):
            for variant in wanted:
                compress_sequential(shop, variant, batch_tokens=BATCH_TOKENS, report=silent)
    else:
        keys = [key for part in drawn.values() for key in part.sets]
        with clock.stage("moments"):
            collect_moments(cached, source, keys, device="cpu", batch_tokens=BATCH_TOKENS, report=silent)
        with clock.stage("solve"):
            solve(shop, wanted)
    with clock.stage("publish"):
        publish_variants(shop, wanted)
    return shop


def main() -> None:
    job, clock = read_job(), Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with clock.stage("all"):
            shop = run(job, folder, clock)
        peak = peak_mib()  # of what the peer does, too
        for compress in job["again"]:
            wanted = planned(job, compress["compress"])
            with clock.stage(f"{compress['label']}, solve"):
                solve_alone(shop, wanted)
            with clock.stage(f"{compress['label']}, with held-out losses and files"):
                solve(shop, wanted)
        if job["out"]:
            shutil.copytree(folder / "run" / "models" / planned(job, job["compress"])[0].name, job["out"])
        answer(
            clock, peak_mib=peak, store_bytes=bytes_below(folder / "store"), models_bytes=bytes_below(folder / "run")
        )


if __name__ == "__main__":
    main()
