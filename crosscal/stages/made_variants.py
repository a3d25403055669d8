"""Variants that earlier runs made: their results, and where their blocks may still be.

One small artifact per (model, dtype, variant, sets of its mixture) holds every layer's row, the model's folder and the
digest of each of its files. Together these digests identify the weights; measurements are stored under them. A run that
wants only numbers needs nothing else. A run that wants the model copies the blocks from that folder, if they still
exist and are unchanged, and solves the others.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosscal.models.adapter import WEIGHTS
from crosscal.models.tensor_files import ADAPTER, INDEX
from crosscal.progress import Report
from crosscal.report.rows import LayerRow, read_rows, write_rows
from crosscal.stages.compress import RunContext
from crosscal.stages.evaluate import EvaluationSet, weights_digest
from crosscal.stages.solved_blocks import ROWS, solution_key
from crosscal.store import Artifact, Store, digest_file
from crosscal.variants import Variant

KIND = "made"
PLACE = "made.json"
BLOCKS = "block-*.safetensors"
ALL_FACTORS = f"{ADAPTER}/{WEIGHTS}"


@dataclass(frozen=True)
class MadeVariant:
    """A variant that an earlier run made."""

    files: dict[str, str]
    """Name → digest of the checkpoint's config and weight files."""
    folder: str
    """The folder with these files."""
    rows: list[LayerRow]

    @property
    def weights(self) -> str:
        return weights_digest(self.files)

    @property
    def is_there(self) -> bool:
        """Whether the folder still holds a model, not necessarily this one."""
        return (Path(self.folder) / INDEX).is_file()

    def is_whole(self, blocks: int) -> bool:
        """Whether the folder still holds this model."""
        return self.is_there and all(self.shard(block) is not None for block in range(blocks))

    def shard(self, block: int) -> Path | None:
        """Return the file of a block if it is unchanged, and so is the file of low-rank parts, if any; else None."""
        names = sorted(name for name in self.files if Path(name).match(BLOCKS))
        return Path(self.folder) / names[block] if self._is_as_it_was(names[block]) and self._has_adapter else None

    @property
    def adapter(self) -> Path | None:
        """The file of all blocks' low-rank parts, if there are any."""
        return Path(self.folder) / ALL_FACTORS if ALL_FACTORS in self.files else None

    @functools.cached_property
    def _has_adapter(self) -> bool:
        return self.adapter is None or self._is_as_it_was(ALL_FACTORS)

    def _is_as_it_was(self, name: str) -> bool:
        file = Path(self.folder) / name
        return file.is_file() and digest_file(file) == self.files[name]


def made_before(context: RunContext, variant: Variant) -> MadeVariant | None:
    """Return what the store knows of a variant, with rows under this plan's name for it; None if it was never made."""
    store = context.cached.store
    artifact = store.find(KIND, solution_key(context, variant))
    if artifact is None:
        return None
    known = json.loads(store.read_bytes(artifact, PLACE))
    rows = read_rows(store.path(artifact, ROWS), LayerRow)
    return MadeVariant(**known, rows=[dataclasses.replace(row, variant=variant.name) for row in rows])


def folder_files(store: Store, folder: Path, variant: str) -> dict[str, str]:
    """Return weight file → digest, as recorded by the run that wrote a variant's folder; empty if not recorded."""
    known = (json.loads(store.read_bytes(made, PLACE)) for made in store.list(KIND) if _is_of(made, variant))
    return next((place["files"] for place in known if place["folder"] == str(folder.absolute())), {})


def _is_of(made: Artifact, variant: str) -> bool:
    return made.provenance.get("variant") == variant


def note_made(
    context: RunContext,
    variant: Variant,
    files: Mapping[str, str],
    rows: Sequence[LayerRow],
    *,
    keep_earlier: bool = True,
) -> None:
    """Record a variant whose model is in the run directory; with `keep_earlier`, unless an earlier model exists."""
    known = made_before(context, variant)
    if known is not None and known.is_there and keep_earlier:
        return
    store, key = context.cached.store, solution_key(context, variant)
    if known is not None:
        store.discard(KIND, key)  # replaced by this run's
    with store.publish(KIND, key, {"model": context.cached.model, "variant": variant.name}) as folder:
        place = {"files": dict(files), "folder": str((context.folder / "models" / variant.name).absolute())}
        (folder / PLACE).write_text(json.dumps(place, indent=1), encoding="utf-8")
        write_rows(folder / ROWS, rows)


def unmeasured(context: RunContext, variants: Sequence[Variant], eval_set: EvaluationSet) -> list[Variant]:
    """Return the variants whose measurements the store lacks."""
    known = {variant.name: made_before(context, variant) for variant in variants}
    return [v for v in variants if (made := known[v.name]) is None or eval_set.find(made.weights) is None]


def take_blocks(context: RunContext, variants: Sequence[Variant], report: Report) -> int:
    """Copy missing blocks into the run directory from those of earlier runs; return how many."""
    taken = 0
    for variant in variants:
        writer = context.writer(variant)
        missing = [block for block in range(context.source.blocks) if not writer.has_block(block)]
        made = made_before(context, variant) if missing else None
        for done, block in enumerate(missing if made else [], start=1):
            assert made is not None
            shard = made.shard(block)
            if shard is not None:
                context.write_rows(variant, block, [row for row in made.rows if row.block == block])
                writer.adopt_block(block, shard, made.adapter)
                taken += 1
            report(f"{variant.name}: taking blocks of an earlier run", done, len(missing))
    return taken
