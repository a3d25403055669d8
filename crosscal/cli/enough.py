"""Command `enough`: is there enough calibration text?"""

from __future__ import annotations

from typing import Any

from crosscal.cli.options import HOME, Domain, Home, Json, PlanFile, Set
from crosscal.cli.printing import print_rows


def enough(
    plan: PlanFile, overrides: Set = None, domain: Domain = None, home: Home = HOME, as_json: Json = False
) -> None:
    """Report for every corpus of a plan whether more text would help: held-out loss as the number of windows doubles.

    Nothing is compressed. The calibration pass covers half of the model's blocks, and only half of the windows if their
    statistics are already in the store.
    """
    from crosscal.flows.enough import measure_enough
    from crosscal.plan import load_plan

    curves = measure_enough(load_plan(plan, tuple(overrides or ()), domain), home)
    print_rows(curves if as_json else [_row(curve) for curve in curves], as_json)


def _row(curve: dict[str, Any]) -> dict[str, Any]:
    points = curve["points"]
    row = {"corpus": curve["corpus"], "verdict": curve["verdict"], "tokens": points[-1]["tokens"] if points else 0}
    row |= {f"{point['windows']} windows": f"{point['held_out_loss']:.4f}" for point in points}
    if curve["last_gain"] is not None:
        row["last doubling"] = f"{-curve['last_gain']:+.1%}"
        row["next, about"] = f"{-curve['expected_gain']:+.1%}"
    return row
