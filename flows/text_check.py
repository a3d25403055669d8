"""What `crosscal plan check` reports about calibration text that is already in the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from crosscal.calibration.sets import windows_by_key
from crosscal.errors import CrosscalError, MissingArtifact
from crosscal.flows.unread import reading
from crosscal.models.source import ModelSource
from crosscal.report.calibration import warnings
from crosscal.stages.describe import quality_of
from crosscal.stages.preflight import BlockShape
from crosscal.tasks.overlap import overlap_of
from crosscal.tasks.run_spec import RunSpec
from crosscal.variants import samples_needed


def check_text(spec: RunSpec, source: ModelSource, shapes: Sequence[BlockShape]) -> tuple[dict[str, Any], list[str]]:
    """Return findings, and the errors that would stop a run; store nothing. The findings are `calibration_quality` of
    the windows already drawn, `overlap` of the corpora already ingested, and `warnings`."""
    quality, told = {}, []
    widest = max((inputs for shape in shapes for _, inputs in shape.sites), default=0)
    for name, seed in samples_needed(spec.parsed):
        known = reading(spec, source, name, seed, spec.cached, held_out=False)
        tokens = known["tokens_to_read"] + known["tokens_cached"]
        if name not in quality and tokens < widest:
            told.append(f"{name}: {tokens:,} tokens for inputs of up to {widest:,}: their Hessians have no full rank.")
        if name not in quality and (tokens_SL := _windows(spec, known["sets"])) is not None:
            is_text = spec.parsed.corpora[name].source != "random"
            quality[name] = quality_of(tokens_SL, source, spec.parsed.calibration.begin_token, is_text=is_text)
    found: dict[str, Any] = {"calibration_quality": quality}
    try:
        found["overlap"], error = overlap_of(spec, keep=False)
    except CrosscalError as broken:  # questions that cannot be read
        error = broken
    return {**found, "warnings": [*dict.fromkeys(told), *warnings(found)]}, [str(error)] if error else []


def _windows(spec: RunSpec, keys: Sequence[str | None]) -> torch.Tensor | None:
    found = []
    for key in filter(None, keys):
        try:
            found.append(windows_by_key(spec.store, key))
        except MissingArtifact:  # not drawn yet, or a sum of older sets
            continue
    return torch.cat(found) if found else None
