"""Command `status`: health of the service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from crosscal.cli.options import Json
from crosscal.resources import SERVICE_FILE


def status(
    config: Annotated[Path | None, typer.Argument(help="The service file; left out, plans/service.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Check the service: server, workers, last watch, domains, refused files, disks. Exit code 1 if any check fails.

    Each check is a line: `ok`, `warn` (the service continues without intervention) or `fail`, with the remedy.
    """
    from crosscal.service import load_service

    service = load_service(config or SERVICE_FILE)
    from crosscal.flows.check import FAIL
    from crosscal.flows.status import status as looked

    checks = looked(service)
    is_well = all(check.state != FAIL for check in checks)
    if as_json:
        print(json.dumps({"well": is_well, "checks": [check.as_json() for check in checks]}))
    else:
        for check in checks:
            print(f"{check.state:4}  {check.name}: {check.said}" + (f". {check.do}" if check.do else ""))
    raise typer.Exit(0 if is_well else 1)
