"""The command line. Every command imports what it needs when it is called, so that `--help` answers at once."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from crosscal.errors import CrosscalError, UsageError

app = typer.Typer(
    help="Calibrate once, compress every way: domain-aware pruning and quantization of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look after the artifact store.", no_args_is_help=True)
plan_app = typer.Typer(help="Read a plan before running it.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.add_typer(plan_app, name="plan")

PlanFile = Annotated[Path, typer.Argument(help="The plan, a YAML file.")]
Home = Annotated[str, typer.Option(envvar="CROSSCAL_HOME", help="The store: a folder or an fsspec URL.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: calibration.windows=64.", metavar="KEY=VALUE")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

HOME = ".crosscal"
DEMO = "plans/demo.yaml"
INTERRUPTED = 130


@app.command()
def run(
    plan: Annotated[Path | None, typer.Argument(help="The plan; left out, the embedded demo.")] = None,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/<model>-<digest>.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Carry out a plan: ingest, sample, read the model, solve, evaluate, report. Run again to resume."""
    plan = plan or _demo_plan()
    logging.getLogger("crosscal").info("%s", plan)  # the imports below take seconds
    from flows.drive import drive

    record = drive(plan, overrides or [], home, str(out) if out else None)
    if as_json:
        print(json.dumps(record))
    else:
        _show_run(record)


@app.command()
def ingest(
    paths: Annotated[list[str], typer.Argument(help="Files, folders, globs or hub dataset ids.")],
    corpus: Annotated[str, typer.Option(help="Name of the corpus to add to.")],
    text: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    split: Annotated[str | None, typer.Option(help="Put all documents into this split.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Add documents to a corpus in the store; what is already there is not added again."""
    from crosscal.corpora import ingest as ingest_documents
    from crosscal.progress import reporting
    from crosscal.store import Store

    with reporting() as report:
        done = ingest_documents(
            Store(home),
            corpus,
            paths,
            text=text,
            split=split,
            revision=revision,
            progress=lambda s, n, t: report(s, n, t),
        )
    summary = {
        "corpus": done.corpus.name,
        "version": done.corpus.version,
        "changed": done.changed,
        "added_documents": done.added_documents,
        "duplicates": done.duplicates,
        "rejected": dict(done.rejected),
    }
    _print(summary, as_json)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model directory, dense or compressed.")],
    plan: Annotated[Path, typer.Option(help="The plan that names corpora and tasks.")],
    overrides: Set = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Measure one model on a plan's test windows and tasks."""
    from crosscal.plan import load_plan
    from flows.evaluate import evaluate_model

    rows = evaluate_model(model, load_plan(plan, tuple(overrides or ())), home)
    if not as_json:
        shown = ("variant", "corpus_or_task", "metric", "value", "stderr", "tokens", "skipped")
        rows = [{name: row[name] for name in shown if row[name] is not None} for row in rows]
    _print_rows(rows, as_json)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html again from its files."""
    from crosscal.report import write_report

    if not (run_dir / "results.jsonl").is_file():
        raise UsageError("this is not a run directory", where=str(run_dir), got="no results.jsonl")
    print(write_report(run_dir))


@plan_app.command("show")
def plan_show(plan: PlanFile, overrides: Set = None) -> None:
    """Print the plan with every default written out."""
    from crosscal.plan import dump_plan, load_plan

    print(dump_plan(load_plan(plan, tuple(overrides or ()))), end="")


@plan_app.command("check")
def plan_check(plan: PlanFile, overrides: Set = None, home: Home = HOME, as_json: Json = False) -> None:
    """Say what a run would compute, what is cached, what it needs and whether that is there."""
    from crosscal.plan import load_plan
    from flows.preflight import check_plan

    findings = check_plan(load_plan(plan, tuple(overrides or ())), home)
    _print(findings, as_json)
    if findings["problems"]:
        raise typer.Exit(1)


@store_app.command("list")
def store_list(
    kind: Annotated[str | None, typer.Argument(help="corpora, calibration, moments, …")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """List artifacts: how many of each kind, or each of one kind."""
    from crosscal.store import Store

    store = Store(home)
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
    _print_rows(rows, as_json)


@store_app.command("verify")
def store_verify(
    quarantine: Annotated[bool, typer.Option(help="Set damaged artifacts aside, so that they are made anew.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Read every byte of every artifact and compare it with its digest."""
    from crosscal.store import Store

    checked = list(Store(home).verify(quarantine=quarantine))
    damaged = [{"kind": kind, "key": key, "problem": problem} for kind, key, problem in checked if problem]
    _print({"artifacts": len(checked), "damaged": damaged}, as_json)
    if damaged:
        raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    unused_days: Annotated[float | None, typer.Option(help="Also remove artifacts unused for so many days.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Remove abandoned work in progress and, on request, what has long not been used. Corpora stay."""
    from crosscal.store import Store

    removed = [{"place": p, "reason": r} for p, r in Store(home).sweep(unused_days=unused_days, dry_run=dry_run)]
    _print_rows(removed, as_json)


def _demo_plan() -> Path:
    plan = Path(__file__).resolve().parents[1] / DEMO
    if not plan.is_file():
        raise UsageError(
            "the demo comes with the source tree", got=f"no {plan}", do="Give a plan, or run in a checkout."
        )
    return plan


def _show_run(record: dict[str, Any]) -> None:
    from rich.console import Console

    from flows.drive import summary

    console = Console(soft_wrap=True)
    for line in summary(record):
        console.print(line, markup=False, highlight=False)


def _print(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(value))
        return
    for name, entry in value.items():
        if isinstance(entry, list):
            print(f"{name}: {len(entry) or 'none'}")
            for item in entry:
                print(f"  {_readable(item)}")
        else:
            print(f"{name}: {_readable(entry)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name}={_amount(name, entry)}" for name, entry in value.items())
    return str(value)


def _amount(name: str, value: Any) -> str:
    return f"{value / 1e6:,.1f}MB" if name.endswith("bytes") and isinstance(value, int) else str(value)


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(_readable(row))
    if not rows:
        print("nothing")


def main() -> None:
    """Run the command line; a failure is one message and an exit code. A traceback means a bug in crosscal."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # Prefect and the hub's client would send usage statistics
    # Idle threads of torch sleep instead of spinning: on a shared machine spinning made evaluation 6 times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _log_to_stderr()
    try:
        app()
    except CrosscalError as error:
        _fail(error, error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written: the machine's state, not a bug
        _fail(error, 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("crosscal: interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise


def _fail(error: Exception, exit_code: int) -> NoReturn:
    if os.environ.get("CROSSCAL_TRACEBACK"):
        raise error
    print(f"crosscal: {error}", file=sys.stderr)
    sys.exit(exit_code)


def _log_to_stderr() -> None:
    """Stages and slow steps as log lines with the time of day; for `crosscal`'s own loggers only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("crosscal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
