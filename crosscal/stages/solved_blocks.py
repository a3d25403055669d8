"""Solved blocks in the store, which carry a block from the machine that solved it to the run directory.

One artifact per (model, variant, sets of its mixture, block) holds the block's shard and low-rank parts, as in the run
directory, and its layer rows. For machines that share only the store, a block is solved if its artifact exists. A run
that has collected a block no longer needs the artifact, and `crosscal store gc` may remove it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from crosscal.errors import MissingArtifact
from crosscal.models.checkpoint import VariantWriter
from crosscal.report.rows import LayerRow, read_rows, write_rows
from crosscal.stages.compress import RunContext
from crosscal.stages.moments import DENSE
from crosscal.stages.sample import over_sums
from crosscal.stages.solve import solve_block
from crosscal.store import digest_of
from crosscal.variants import Variant

FORMAT = 3  # bump when solutions or their files change; since 3 experts are packed
KIND = "blocks"
ROWS = "layers.jsonl"


def publish_block(context: RunContext, block: int, variants: Sequence[Variant]) -> int:
    """Solve one block for all variants whose solution the store lacks, and store it; return how many were solved."""
    store = context.cached.store
    keys = {variant.name: solution_key(context, variant, block) for variant in variants}
    missing = [variant for variant in variants if store.find(KIND, keys[variant.name]) is None]
    if missing:
        problem = context.problem(block, context.cached)
        solutions = solve_block(problem, missing)
        for variant in missing:
            provenance = {"model": context.cached.model, "variant": variant.name, "block": block}
            with store.publish(KIND, keys[variant.name], provenance) as folder:
                write_rows(folder / ROWS, solutions[variant.name].rows)
                writer, solved = VariantWriter(folder, context.source), solutions[variant.name]
                writer.write_block(block, solved.changed, packed=solved.packed, dense=problem.parameters)
    return len(missing)


def collect_block(context: RunContext, block: int, variants: Sequence[Variant]) -> int:
    """Copy a stored block into the run directory for the variants that lack it there; return how many.

    Raises `MissingArtifact` if the store lacks it, as when the workers use another store.
    """
    store = context.cached.store
    missing = [variant for variant in variants if not context.writer(variant).has_block(block)]
    for variant in missing:
        artifact = store.find(KIND, solution_key(context, variant, block))
        if artifact is None:
            raise MissingArtifact(
                "a solved block is not in the store",
                where=f"{variant.name}, block {block}",
                got=store.location,
                do="CROSSCAL_HOME must be one place for all workers: a shared folder, or a URL such as s3://bucket.",
            )
        rows = read_rows(store.path(artifact, ROWS), LayerRow)
        # Another plan may have stored the same variant under another name.
        context.write_rows(variant, block, [dataclasses.replace(row, variant=variant.name) for row in rows])
        shard, *adapter = sorted((name for name in artifact.files if name != ROWS), key=lambda name: "/" in name)
        adapter_file = store.path(artifact, adapter[0]) if adapter else None
        context.writer(variant).adopt_block(block, store.path(artifact, shard), adapter_file)
    return len(missing)


def solution_key(context: RunContext, variant: Variant, block: int | None = None) -> str:
    """Return the digest of all that the solution of a block, or of all blocks, depends on, and of its rows' fields.

    Corpora are identified by their windows, not by their names; only `measured_on` includes the names.
    """
    mixtures = variant.mixtures(context.reference)
    samples = {corpus: context.samples[corpus, variant.seed] for mixture in mixtures for corpus in mixture.corpora}
    sums = [over_sums(each, samples, held_out=held_out).weights for each in mixtures for held_out in (False, True)]
    fields = [field.name for field in dataclasses.fields(LayerRow)]
    measured: list[Any] = [] if context.cached.measures_losses else ["without losses"]
    if context.measured_on and variant.upstream == DENSE:
        measured.append(
            [[context.samples[corpus, variant.seed].held_out.key, corpus] for corpus in context.measured_on]
        )
    return digest_of([FORMAT, fields, context.cached.model, context.cached.dtype, variant.key, sums, block, *measured])
