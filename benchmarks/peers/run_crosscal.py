"""crosscal's side of a comparison, with the steps of a normal run: `run_crosscal.py JOB`.

The store is empty at the start. The calibration pass includes held-out windows, and every layer's held-out loss is
measured, as in every run of crosscal; the peers do neither. `again` in the job solves further sparsities afterwards, on
the stored moments.
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
from crosscal.compressors import LayerProblem, solve
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import site_of
from crosscal.flows.pipeline import read_model, solve_blocks
from crosscal.lanes import side_by_side
from crosscal.models import ModelSource
from crosscal.plan import parse_plan
from crosscal.stages.compress import RunContext
from crosscal.stages.sample import PoolPart, Sample, SplitSets
from crosscal.store import Store, digest_of
from crosscal.tasks.model import publish_models, solve_sequential
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import Variant


def stored(store: Store, corpus: str, tokens_SL: torch.Tensor) -> str:
    provenance = {"benchmark": corpus}
    stored_windows(store, provenance, lambda: tokens_SL)
    return digest_of(provenance)


def sample(store: Store, corpus: str, tokens_SL: torch.Tensor, held_out_SL: torch.Tensor) -> Sample:
    calibration, held_out = stored(store, corpus, tokens_SL), stored(store, f"{corpus} held out", held_out_SL)
    sums = (
        SplitSets((PoolPart(key, set_SL.numel()),))
        for key, set_SL in ((calibration, tokens_SL), (held_out, held_out_SL))
    )
    return Sample(corpus, 0, *sums)


def samples(store: Store, job: dict[str, Any]) -> list[Sample]:
    """Split the windows equally among the corpora, so that together they are the windows of a peer."""
    calibration_SL, held_out_SL = windows(job, "calibration"), windows(job, "held_out")
    by_default = max(len(calibration_SL) // 8, len(job["corpora"]))  # the default share of a plan
    held_out_SL = held_out_SL[: job["held_out"] or by_default]
    parts = zip(
        job["corpora"],
        calibration_SL.chunk(len(job["corpora"])),
        held_out_SL.chunk(len(job["corpora"])),
        strict=True,
    )
    return [sample(store, corpus, tokens_SL, held_out_SL) for corpus, tokens_SL, held_out_SL in parts]


def ticket_of(
    model: str, corpora: Sequence[str], compress: Sequence[dict[str, Any]], drawn: Sequence[Sample], folder: Path
) -> RunSpec:
    """Return the spec that a run passes to its steps once windows are drawn; corpora are no longer read."""
    unread = dict.fromkeys(corpora, "unread")
    asked = {"model": model, "corpora": unread, "compress": list(compress), "execution": {"device": "cpu"}}
    return RunSpec(
        parse_plan(asked).model_dump(mode="json"),
        str(folder / "store"),
        model=ModelSource.open(model).digest,
        device="cpu",
        dtype="float32",
        run_dir=str(folder / "run"),
        samples=[each.as_json() for each in drawn],
    )


def solve_alone(context: RunContext, wanted: Sequence[Variant]) -> None:
    """The work of a peer's solve, but from the store instead of memory: load, factor and solve, with losses on the
    calibration set; no held-out losses, and the results are dropped. The variants share mixture and damping."""
    blocks = [partial(solve_block_alone, context, block, wanted) for block in range(context.source.blocks)]
    side_by_side(blocks)


def solve_block_alone(context: RunContext, block: int, wanted: Sequence[Variant]) -> None:
    parameters, mixture = context.source.load_block(block), wanted[0].mixture
    assert mixture is not None
    keys = {corpus: drawn.calibration.apart[0].key for (corpus, _), drawn in context.samples.items()}
    for site in context.cached.sites(block) or ():
        moments = {corpus: context.cached.read(keys[corpus], block, site) for corpus in mixture.corpora}
        hessian_II = mixture.hessian_II(moments)
        problems = [LayerProblem(m.name, m.weight_OI(parameters), hessian_II) for m in site.matrices]
        for state in solve(site_of(problems), [variant.steps for variant in wanted]):
            for problem, layer in zip(problems, state.layers, strict=True):
                solved(problem, layer)


def run(spec: RunSpec, clock: Clock) -> None:
    if sequential := spec.variants("sequential"):
        with clock.stage("moments and solve"):
            for variant in sequential:
                solve_sequential.fn(spec, variant.name)
    else:
        with clock.stage("moments"):
            list(read_model(None, spec))
        with clock.stage("solve"):
            solve_blocks(None, spec)
    with clock.stage("publish"):
        publish_models.fn(spec)


def main() -> None:
    job, clock = read_job(), Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with clock.stage("all"):
            drawn = samples(Store(folder / "store"), job)
            spec = ticket_of(job["model"], job["corpora"], job["compress"], drawn, folder)
            run(spec, clock)
        peak = peak_mib()  # only of the part that the peer does, too
        for compress in job["again"]:
            again = ticket_of(job["model"], job["corpora"], compress["compress"], drawn, folder)
            with clock.stage(f"{compress['label']}, solve"):
                solve_alone(again.run_context(), again.variants())
            with clock.stage(f"{compress['label']}, with held-out losses and files"):
                solve_blocks(None, again)
        if job["out"]:
            shutil.copytree(folder / "run" / "models" / spec.variants()[0].name, job["out"])
        answer(
            clock, peak_mib=peak, store_bytes=bytes_below(folder / "store"), models_bytes=bytes_below(folder / "run")
        )


if __name__ == "__main__":
    main()
