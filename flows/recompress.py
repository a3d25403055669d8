"""The flow that carries out a plan. Run it with `crosscal run`, or deploy it (`deployment.yaml`).

The steps are imported only when they run: deploying, comparing or starting the flow needs its signature, not the
seconds that importing their libraries takes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow

from crosscal.errors import UsageError
from crosscal.flows.outcome import shown
from crosscal.flows.shown import run_name, tag_run
from crosscal.flows.stuck_runs import note_process
from crosscal.plan import load_plan


@flow(
    name="recompress",
    flow_run_name=run_name,
    on_running=[note_process],
    persist_result=False,
    result_serializer="json",
)
def recompress(
    plan_path: str,
    overrides: list[str] | None = None,
    home: str | None = None,
    out: str | None = None,
    domain: str | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Carry out a compression plan; return the run's record, as in `run.json`.

    `home` is the store (default CROSSCAL_HOME, `.crosscal`), `out` the run directory (default
    `runs/<model>-<digest>`). With `domain`, the plan's $domain is filled in and the ledger decides what to do (see
    `flows.landed`): the record then has `message` and `runs`, none when nothing is pending, and `out` holds a run
    directory for each version. `again` repeats a newest version that was carried out, given up or cancelled.
    """
    from crosscal.flows.quiet import quiet_libraries

    quiet_libraries()
    home = home or os.environ.get("CROSSCAL_HOME", ".crosscal")
    return shown(lambda: _recompress(Path(plan_path), tuple(overrides or ()), home, out, domain, again))


def _recompress(
    plan_path: Path, overrides: tuple[str, ...], home: str, out: str | None, domain: str | None, again: bool
) -> dict[str, Any]:
    from crosscal.flows.landed import recompress_domain
    from crosscal.flows.pipeline import carry_out

    if domain is not None:
        return recompress_domain(plan_path, overrides, home, out, domain, again=again)
    if again:
        raise UsageError("only a domain is carried out again by --again", do="Name it by --domain; or leave it out.")
    plan = load_plan(plan_path, overrides)
    tag_run(plan, None)
    return carry_out(plan, home, out)
