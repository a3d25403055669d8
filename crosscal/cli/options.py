"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PlanFile = Annotated[Path, typer.Argument(help="The plan, a YAML file.")]
Home = Annotated[str, typer.Option(envvar="CROSSCAL_HOME", help="The store: a folder or an fsspec URL.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: calibration.windows=64.", metavar="KEY=VALUE")
]
Domain = Annotated[str | None, typer.Option(help="A landed domain that the plan's $domain stands for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

HOME = ".crosscal"
