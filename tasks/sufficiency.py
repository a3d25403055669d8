"""Measure whether every corpus has enough calibration text."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect import task

from crosscal.stages.describe import first_draws
from crosscal.stages.sufficiency import sufficiency
from crosscal.statistics import Statistic
from crosscal.tasks.options import PLAIN
from crosscal.tasks.run_spec import RunSpec, task_report


@task(name="sufficiency", task_run_name="is there enough data", **PLAIN)
def measure_sufficiency(spec: RunSpec) -> list[dict[str, Any]]:
    """Measure each corpus's sufficiency curve on its first draw; return them as in a run's record, and store them."""
    cached = dataclasses.replace(spec.cached, wanted=frozenset({Statistic.GRAM}))
    found = []
    with task_report() as report:
        for sample in first_draws(spec.sampled):
            curve = sufficiency(
                cached,
                spec.source(),
                sample,
                device=spec.device,
                batch_tokens=spec.parsed.calibration.batch_tokens,
                report=lambda _, done, total, corpus=sample.corpus: report(f"{corpus}: enough?", done, total),
            )
            found.append(curve.as_json())
    return found
