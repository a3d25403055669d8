"""The parts of a study: which variants are made together, and in which directory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscal.plan import CompressionPlan, Study
from crosscal.store.keys import digest_of
from crosscal.variants import variants


@dataclass(frozen=True)
class StudyPart:
    """Variants of one draw that are made together, and their run directory."""

    seed: int
    variants: tuple[str, ...]
    folder: Path

    @property
    def is_complete(self) -> bool:
        return (self.folder / "run.json").is_file()


def parts_of(plan: CompressionPlan, folder: Path, inputs: Sequence[Any]) -> list[StudyPart]:
    """Split a study into parts, draw by draw, of at most `models_at_once` variants.

    A part is named by a digest of all that its numbers depend on: `inputs` (model, corpora and tasks, by
    their content), its variants, and the plan except for its section `study` and its seed.
    """
    asked = plan.study or Study()  # pyright: ignore[reportCallIssue]
    found = sorted(variants(plan), key=lambda variant: plan.seeds.index(variant.seed))
    parts = []
    for seed, same in itertools.groupby(found, key=lambda variant: variant.seed):
        for some in _some(list(same), asked.models_at_once):
            named = [(variant.name, variant.key) for variant in some]
            key = digest_of([_without_draws(plan), list(inputs), named])
            parts.append(
                StudyPart(seed, tuple(variant.name for variant in some), folder / "parts" / f"s{seed}-{key[:8]}")
            )
    return parts


def folder_of(plan: CompressionPlan) -> Path:
    """Return the default directory of a study."""
    runs = Path(os.environ.get("CROSSCAL_RUNS", "runs"))
    return (runs / f"{Path(plan.model).name}-study-{digest_of(_without_draws(plan))[:8]}").absolute()


def _some(found: list[Any], most: int) -> Iterator[list[Any]]:
    yield from (found[start : start + most] for start in range(0, len(found), most))


def _without_draws(plan: CompressionPlan) -> dict[str, Any]:
    content = plan.model_dump(mode="json", exclude={"study"})
    content["calibration"].pop("seed")
    return content
