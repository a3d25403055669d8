"""Commands `deploy` and `worker`: put the service on a Prefect server or compare it with the files, start workers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from crosscal.cli.options import Json
from crosscal.resources import SERVICE_FILE

SHOWN = 100


def deploy(
    config: Annotated[Path | None, typer.Argument(help="The service file; left out, plans/service.yaml.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what differs; exit 1 if anything does.")] = False,
    as_json: Json = False,
) -> None:
    """Create or update work pool, queues, limits and deployments on the Prefect server; what is up to date is kept."""
    from crosscal.service import load_service

    service = load_service(config or SERVICE_FILE)
    from crosscal.flows.deploying import compare
    from crosscal.flows.deploying import deploy as bring_there

    if check:
        found = [each.as_json() for each in compare(service)]
        print(json.dumps({"differences": found})) if as_json else _show_check(found)
        raise typer.Exit(1 if found else 0)
    done = bring_there(service)
    print(json.dumps(done)) if as_json else _show(done)


def worker(name: Annotated[str, typer.Argument(help="gpu0, gpu1, … or service, as `crosscal deploy` says.")]) -> None:
    """Replace this process by a worker. The service has one worker for each GPU, and one that needs none."""
    from crosscal.flows.workers import worker as command_of

    command, settings = command_of(name)
    os.execve(command[0], command, {**os.environ, **settings})


def _show_check(found: list[dict[str, Any]]) -> None:
    for each in found:
        print(_line(each))
    print(f"{len(found)} differences" if found else "deployed as the files say")


def _show(done: dict[str, Any]) -> None:
    for thing in done["made"]:
        print(f"made       {thing}")
    for each in done["changed"]:
        print(f"changed    {_line(each)}")
    for thing in done["unchanged"]:
        print(f"unchanged  {thing}")
    for thing in done["removed"]:
        print(f"removed    {thing}: it is not in the files any more")
    for thing in done["left alone"]:
        print(f"left alone {thing}: it is not in the files")
    print("\nWorkers to start, each in a terminal or service of its own:\n")
    for command in done["workers"]:
        print(command)


def _line(each: dict[str, Any]) -> str:
    if not each["field"]:
        return f"{each['thing']}: " + ("not deployed" if each["wanted"] == "yes" else "not in the files")
    return f"{each['thing']}: {each['field']} is {_short(each['deployed'])}, should be {_short(each['wanted'])}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
