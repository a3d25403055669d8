"""Check whether a plan has enough calibration text, before anything is compressed: `crosscal enough`."""

from __future__ import annotations

import dataclasses
from typing import Any

from crosscal.flows.quiet import quiet_libraries
from crosscal.plan import CompressionPlan, SelfGenerated
from crosscal.tasks.corpora import bring_in, draw_sample
from crosscal.tasks.model import identify
from crosscal.tasks.run_spec import RunSpec
from crosscal.tasks.sufficiency import measure_sufficiency
from crosscal.variants import samples_needed


def measure_enough(plan: CompressionPlan, home: str) -> list[dict[str, Any]]:
    """Return the sufficiency curve of every corpus that the plan calibrates on, for its first draw."""
    quiet_libraries()
    spec = RunSpec(plan.model_dump(mode="json"), home)
    known = identify(spec)
    spec = dataclasses.replace(spec, model=known["model"], device=known["device"], dtype=known["dtype"])
    asked = samples_needed(plan) or [(name, plan.seeds[0]) for name in plan.corpora]
    needed: dict[str, int] = {}
    for name, seed in asked:
        needed.setdefault(name, seed)
    origins = [plan.corpora[name] for name in needed]
    continued = {origin.seeds for origin in origins if isinstance(origin, SelfGenerated)}
    wanted = [name for name in plan.document_corpora if name in needed or name in continued]
    corpora = bring_in(spec, lambda task, *given: task.fn(*given), wanted)
    stored = {name: corpora[name]["stored"] for name in wanted}
    samples = [draw_sample.fn(spec, name, stored.get(name, name), seed) for name, seed in needed.items()]
    return measure_sufficiency.fn(dataclasses.replace(spec, samples=samples))
