"""Solved blocks in the store: how a block travels from the machine that solved it to the run directory.

One artifact per (model, variant, sets of its mixture, block): the block's shard as the run directory keeps it, and its
layer rows. Where machines share only the store, existing there means solved; a run that collected a block needs the
artifact no longer, and `crosscal store gc` may remove it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from crosscal.errors import MissingArtifact
from crosscal.models.checkpoint import VariantWriter
from crosscal.report.rows import LayerRow, read_rows, write_rows
from crosscal.stages.compress import Workshop
from crosscal.stages.sample import over_sums
from crosscal.stages.solve import solve_block
from crosscal.store import digest_of
from crosscal.variants import Variant

FORMAT = 1  # a change of what solvers compute makes new keys
KIND = "blocks"
ROWS = "layers.jsonl"


def publish_block(shop: Workshop, block: int, variants: Sequence[Variant]) -> int:
    """Solve one block for all variants whose solution is not in the store, and keep it there; returns how many."""
    store = shop.cached.store
    keys = {variant.name: block_key(shop, variant, block) for variant in variants}
    missing = [variant for variant in variants if store.find(KIND, keys[variant.name]) is None]
    if missing:
        problem = shop.problem(block, shop.cached)
        solutions = solve_block(problem, missing)
        for variant in missing:
            provenance = {"model": shop.cached.model, "variant": variant.name, "block": block}
            with store.publish(KIND, keys[variant.name], provenance) as folder:
                write_rows(folder / ROWS, solutions[variant.name].rows)
                writer, changed = VariantWriter(folder, shop.source), solutions[variant.name].changed
                writer.write_block(block, changed, dense=problem.parameters)
    return len(missing)


def collect_block(shop: Workshop, block: int, variants: Sequence[Variant]) -> int:
    """Bring a published block into the run directory, for the variants that have none of it; returns how many.

    Raises `MissingArtifact` when the workers keep their solutions elsewhere.
    """
    store = shop.cached.store
    missing = [variant for variant in variants if not shop.writer(variant).has_block(block)]
    for variant in missing:
        artifact = store.find(KIND, block_key(shop, variant, block))
        if artifact is None:
            raise MissingArtifact(
                "a solved block is not in the store",
                where=f"{variant.name}, block {block}",
                got=store.location,
                do="CROSSCAL_HOME must be one place for all workers: a shared folder, or a URL such as s3://bucket.",
            )
        rows = read_rows(store.path(artifact, ROWS), LayerRow)
        # A plan may call the same variant differently.
        shop.write_rows(variant, block, [dataclasses.replace(row, variant=variant.name) for row in rows])
        shard = next(name for name in artifact.files if name != ROWS)
        shop.writer(variant).adopt_block(block, store.path(artifact, shard))
    return len(missing)


def block_key(shop: Workshop, variant: Variant, block: int) -> str:
    """Everything that the solution depends on: names of corpora do not enter, the windows behind them do."""
    mixture = variant.mixture or shop.reference
    samples = {corpus: shop.samples[corpus, variant.seed] for corpus in mixture.corpora}
    sets = [over_sums(mixture, samples, held_out=held_out).weights for held_out in (False, True)]
    return digest_of([FORMAT, shop.cached.model, shop.cached.dtype, variant.key, sets, block])
