"""The flow that carries out a plan. Run it with `crosscal run`, or deploy it (`deployment.yaml`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow

from crosscal.plan import load_plan
from flows.pipeline import carry_out
from flows.quiet import quiet_libraries


@flow(name="recompress", flow_run_name="{plan_path}", persist_result=False, result_serializer="json")
def recompress(
    plan_path: str, overrides: list[str] | None = None, home: str | None = None, out: str | None = None
) -> dict[str, Any]:
    """Carry out a plan; returns the run's record, as in `run.json`.

    `home` is the store (CROSSCAL_HOME, `.crosscal`), `out` the run directory (`runs/<model>-<digest>`).
    """
    quiet_libraries()
    plan = load_plan(Path(plan_path), tuple(overrides or ()))
    return carry_out(plan, home or os.environ.get("CROSSCAL_HOME", ".crosscal"), out)
