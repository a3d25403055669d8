"""Losses of a variant on each corpus with a candidate mixture: solved and measured, but not kept as a model.

One artifact per (candidate, block) holds every matrix's held-out loss on each corpus. Its key is that of the
candidate's solution plus the corpora it is measured on. Any later run that needs the losses reads a few kilobytes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from crosscal.errors import StatisticsError
from crosscal.report.rows import LayerRow
from crosscal.stages.allocate import allocated
from crosscal.stages.compress import RunContext
from crosscal.stages.solve import rows_of_block
from crosscal.stages.solved_blocks import solution_key
from crosscal.store import digest_of
from crosscal.variants import Variant

FORMAT = 1  # bump when something else is measured
KIND = "losses"
FILE = "losses.json"

Losses = Mapping[str, float]
"""Corpus -> mean relative loss of the solved matrices on its held-out text."""


@dataclass(frozen=True)
class Candidate:
    """A variant with a candidate mixture, and the corpora on which its losses are measured."""

    variant: Variant
    corpora: tuple[str, ...]


def measure_block(context: RunContext, block: int, candidates: Sequence[Candidate]) -> int:
    """Solve and measure the candidates whose losses in a block the store lacks; return how many were solved."""
    store = context.cached.store
    missing = [one for one in candidates if store.find(KIND, _key(context, one, block)) is None]
    if missing:
        corpora = tuple(sorted({corpus for one in missing for corpus in one.corpora}))
        variants = [one.variant for one in missing]
        problem = dataclasses.replace(allocated(context, variants), measured_on=corpora).problem(block, context.cached)
        found = rows_of_block(problem, variants)
        for one in missing:
            keep_losses(context, block, one, found[one.variant.name])
    return len(missing)


def keep_losses(context: RunContext, block: int, candidate: Candidate, rows: Iterable[LayerRow]) -> None:
    """Store a candidate's losses in a block."""
    solved = [row for row in rows if not row.stays_dense]
    losses = {row.layer: _only(candidate.corpora, row.corpus_losses or {}) for row in solved}
    provenance = {"model": context.cached.model, "variant": candidate.variant.name, "block": block}
    with context.cached.store.publish(KIND, _key(context, candidate, block), provenance) as folder:
        (folder / FILE).write_text(json.dumps(losses))


def unmeasured(context: RunContext, candidates: Sequence[Candidate]) -> list[int]:
    """Return the blocks in which some candidate's losses are not stored."""
    find, blocks = context.cached.store.find, range(context.source.blocks)
    return [block for block in blocks if any(find(KIND, _key(context, one, block)) is None for one in candidates)]


def losses_of(context: RunContext, candidate: Candidate) -> Losses | None:
    """Return unweighted means over the matrices of all blocks; None if some block was not measured."""
    of_corpora: dict[str, list[float]] = {corpus: [] for corpus in candidate.corpora}
    for block in range(context.source.blocks):
        artifact = context.cached.store.find(KIND, _key(context, candidate, block))
        if artifact is None:
            return None
        for of_layer in json.loads(context.cached.store.read_bytes(artifact, FILE)).values():
            for corpus, loss in of_layer.items():
                of_corpora[corpus].append(loss)
    if any(not losses for losses in of_corpora.values()):
        none = next(corpus for corpus, losses in of_corpora.items() if not losses)
        raise StatisticsError("no matrix has a loss on held-out text", where=f"{candidate.variant.name}, {none}")
    return {corpus: statistics.fmean(losses) for corpus, losses in of_corpora.items()}


def _key(context: RunContext, candidate: Candidate, block: int) -> str:
    measured = dataclasses.replace(context, measured_on=candidate.corpora)
    return digest_of([FORMAT, solution_key(measured, candidate.variant, block)])


def _only(corpora: Sequence[str], losses: Losses) -> dict[str, float]:
    return {corpus: loss for corpus, loss in losses.items() if corpus in corpora}
