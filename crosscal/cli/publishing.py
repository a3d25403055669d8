"""Commands `ledger` and `publish`: landed files with their runs, and the published model of a domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crosscal.cli.options import HOME, Home, Json, store_at
from crosscal.cli.printing import print_rows
from crosscal.errors import UsageError, nearest


def ledger(
    domain: Annotated[str | None, typer.Argument(help="One domain with its files and runs; left out, all.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show what landed, what is pending, which runs were tried, and their outcome."""
    from dataclasses import asdict

    from crosscal.landing import Ledger
    from crosscal.landing.refused import refused
    from crosscal.landing.status import check_known, domain_history, overview

    found = Ledger(store_at(home))
    if domain is None:
        standing = [asdict(each) for each in refused(found.look())]
        if as_json:
            print(json.dumps({"domains": overview(found), "refused": standing}))
            return
        print_rows(overview(found), as_json=False)
        for each in standing:
            print(_refused(each))
        return
    check_known(found, domain)
    way = domain_history(found, domain)
    print(json.dumps(way)) if as_json else _show(way)


def publish(
    domain: Annotated[str, typer.Argument(help="The domain whose published model is meant.")],
    rollback: Annotated[bool, typer.Option("--rollback", help="Publish the model before this one again.")] = False,
    to_move: Annotated[int | None, typer.Option(help="Publish the model of this earlier move again.")] = None,
    variant: Annotated[str | None, typer.Option(help="Publish this model of a run, with --run.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's directory, with --variant.")] = None,
    to: Annotated[Path | None, typer.Option(help="Copy the published model into this new folder.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show the published model of a domain and its history, copy it, go back to an earlier one, or publish another.

    The service never reverts this: it decides again only after a new version or a new request.
    """
    from crosscal.publication import Published
    from crosscal.publication.models import copy_model, local_folder

    store = store_at(home)
    published = Published(store)
    if rollback + (to_move is not None) + bool(variant or run) > 1 or (variant is None) != (run is None):
        raise UsageError("give one of --rollback, --to-move N, and --variant NAME with --run DIR")
    if rollback or to_move is not None or variant is not None:
        from crosscal.flows.publishing import go_back, publish_by_hand

        if variant is not None and run is not None:
            publish_by_hand(store, domain, run, variant)
        else:
            go_back(store, domain, to_move)
    current = published.current(domain)
    if current is None:
        do = nearest(domain, published.domains())
        raise UsageError("nothing is published for this domain", where=home, got=domain, do=do)
    path = copy_model(store, current.model, to) if to else local_folder(store, current.model)
    history = [{"move": move.number, **move.facts} for move in published.history(domain)]
    if as_json:
        shown = {"domain": domain, "move": current.number, **current.facts}
        print(json.dumps({**shown, "path": None if path is None else str(path.absolute()), "history": history}))
        return
    for move in history:
        print(_move(move, is_current=move["move"] == current.number))
    print(f"model: {path or 'in a remote store; --to DIR copies it out'}")


def _move(move: dict[str, Any], is_current: bool) -> str:
    origin = f"back to move {move['restored']}" if "restored" in move else move.get("reason", "")
    mark = "*" if is_current else " "
    return f"{mark} {move['move']}  {move['at']}  v{move['corpus_version']}  {move['variant']}  {origin}"


def _show(way: dict[str, Any]) -> None:
    print(f"{way['domain']} v{way['version']}: {way['state']}")
    for file in way["files"]:
        print(f"  {', '.join(file['names'])}: {' → '.join(map(_line, file['states']))}")
    for run in way["runs"]:
        last = run["states"][-1]
        reason = f": {last['reason']}" if "reason" in last else ""
        print(f"  run {run['number']} of v{run['version']} ({run['run_id']}): {last['state']} {last['at']}{reason}")
    for each in way["refused"]:
        print(f"  {_refused(each)}")


def _line(line: dict[str, Any]) -> str:
    """Format a state of a file; for an ingested file with its document count, split and reject reasons."""
    told = [f"{line['documents']:,} documents"] if "documents" in line else []
    told += [f"all of the {line['split']} split, for that is the file's name"] if "split" in line else []
    told += [f"{count:,} not: {reason}" for reason, count in line.get("rejected", {}).items()]
    return line["state"] + (f" ({'; '.join(told)})" if told else "")


def _refused(each: dict[str, Any]) -> str:
    where = "/".join(part for part in (each["domain"], each["name"]) if part)
    return f"refused: {where}, {each['at'][:16].replace('T', ' ')}: {each['reason']}. {each['do']}".rstrip()
