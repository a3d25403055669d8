"""Commands `store …`: maintain the artifact store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crosscal.cli.options import HOME, Home, Json, store_at
from crosscal.cli.printing import print_rows, print_value
from crosscal.errors import UsageError

RUNS = Path("runs")
app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True)


@app.command("list")
def list_artifacts(
    kind: Annotated[str | None, typer.Argument(help="corpora, calibration, moments, …")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """List the number and size of artifacts of each kind, or every artifact of one kind."""
    store = store_at(home)
    kinds = sorted({found for found, _ in store.keys()})  # noqa: SIM118  not a mapping
    if kind is not None and kind not in kinds:
        raise UsageError(
            "no such kind in the store", where=home, got=kind, do=f"Kinds: {', '.join(kinds) or 'none yet'}."
        )
    artifacts = list(store.list(kind))
    if kind is None:
        rows = [
            {"kind": k, "artifacts": len(of), "bytes": sum(a.bytes for a in of)}
            for k in kinds
            for of in [[a for a in artifacts if a.kind == k]]
        ]
    else:
        rows = [{"key": a.key, "created": a.created, "bytes": a.bytes, **a.provenance} for a in artifacts]
    print_rows(rows, as_json)


@app.command("verify")
def verify(
    quarantine: Annotated[
        bool, typer.Option(help="Quarantine damaged artifacts, so that they are recomputed.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="Skip artifacts verified before and unchanged since, except a daily sample.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Read every byte of every artifact and compare it with its digest."""
    checked = list(store_at(home).verify(quarantine=quarantine, quick=quick))
    damaged = [{"kind": kind, "key": key, "problem": problem} for kind, key, problem in checked if problem]
    print_value({"artifacts": len(checked), "damaged": damaged}, as_json)
    if damaged:
        raise typer.Exit(1)


@app.command("gc")
def collect_garbage(
    unused_days: Annotated[
        float | None, typer.Option(min=0, help="Also remove artifacts unused for so many days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Remove abandoned work in progress, everything derived from documents that were removed from a corpus and, on
    request, artifacts unused for a long time. Corpora stay."""
    from crosscal.flows.taken_out import discard_taken_out

    store = store_at(home)
    removed = [*store.sweep(unused_days=unused_days, dry_run=dry_run), *discard_taken_out(store, dry_run=dry_run)]
    print_rows([{"place": place, "reason": reason} for place, reason in removed], as_json)


@app.command("du")
def disk_usage(
    runs: Annotated[Path, typer.Option(envvar="CROSSCAL_RUNS", help="The folder of the run directories.")] = RUNS,
    unused_days: Annotated[
        float | None, typer.Option(min=0, help="Count what `gc` with so many days would free.")
    ] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Report disk usage by kind, by corpus and version, and by run, and what `gc` would free."""
    from crosscal.usage import usage

    found = usage(store_at(home), runs, unused_days)
    print_value(found, as_json)
