"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosscal.errors import UsageError

if TYPE_CHECKING:
    from crosscal.store import Store

PlanFile = Annotated[Path, typer.Argument(help="The plan, a YAML file.")]
Home = Annotated[str, typer.Option(envvar="CROSSCAL_HOME", help="The store: a folder or an fsspec URL.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: calibration.windows=64.", metavar="KEY=VALUE")
]
Domain = Annotated[str | None, typer.Option(help="A landed domain that the plan's $domain stands for.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

HOME = ".crosscal"


def store_at(home: str) -> Store:
    """Return an existing store, for commands that only read. Creates none; raises `UsageError` if there is none."""
    from crosscal.store import Store

    store = Store(home)
    if not store.exists:
        do = "Give --home, or CROSSCAL_HOME, the folder or URL that runs write to; the first run or landing makes it."
        raise UsageError("there is no store here", where=store.home.location, do=do)
    return store
