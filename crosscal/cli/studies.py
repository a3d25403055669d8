"""Command `study`: a plan's sweep for several draws, and the significance of its differences."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from crosscal.cli.options import HOME, Domain, Home, Json, PlanFile, Set
from crosscal.errors import CrosscalError


def study(
    plan: PlanFile,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option(help="Directory; by default runs/<model>-study-<digest>.")] = None,
    parts: Annotated[
        int | None, typer.Option(min=0, help="Carry out at most N more parts; 0: only write the results.")
    ] = None,
    domain: Domain = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Carry out a plan for several draws of the calibration text; report which differences are significant.

    The plan's `study` names draws and baselines. Models are made in parts, measured and discarded. Run the command
    again to resume, or with more draws: only the additional ones are computed.
    """
    logging.getLogger("crosscal").info("%s", plan)  # the imports below take seconds
    from crosscal.flows.drive import drive_study

    record = drive_study(plan, overrides or [], home, str(out) if out else None, parts, domain)
    if as_json:
        print(json.dumps(record))
    else:
        _show(record)
    if record["failed"]:
        raise CrosscalError(
            "these variants could not be written as loadable models; all others were", got=", ".join(record["failed"])
        )


def _show(record: dict[str, object]) -> None:
    from rich.console import Console

    from crosscal.flows.drive import study_summary

    console = Console(soft_wrap=True)
    for line in study_summary(record):
        console.print(line, markup=False, highlight=False)
