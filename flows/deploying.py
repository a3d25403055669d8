"""Bring a Prefect server to what `deployment.yaml` and a service file say, or only say how they differ.

Deploying itself is Prefect's: the file, filled in, goes through `prefect deploy`. Around it stand the pool, the queues
and their limits, and a comparison before (what is as it should be is left alone) and after (the server took all of it).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.workers.process import ProcessWorker

from crosscal.errors import CrosscalError
from crosscal.flows.deployed import (
    COMPRESS,
    POOL,
    SERVICE,
    SERVICE_RUNS,
    Difference,
    Things,
    deployed,
    differences,
    wanted,
)
from crosscal.flows.deployment_file import check_plans, read_deployments
from crosscal.flows.health import server_needed
from crosscal.resources import ROOT
from crosscal.service import ServiceConfig

PROMPT = {"PREFECT_WORKER_QUERY_SECONDS": "2"}
"""A worker asks for work this often; of its own accord every ten seconds."""


def compare(service: ServiceConfig, checkout: Path = ROOT) -> list[Difference]:
    """How the server differs from the file. Changes nothing."""
    server_needed("`crosscal deploy`")
    want = wanted(_checked(service, checkout), service, checkout)
    with get_client(sync_client=True) as client:
        return list(differences(deployed(client), want))


def deploy(service: ServiceConfig, checkout: Path = ROOT) -> dict[str, Any]:
    """Make or change what differs; returns what was made, changed, left alone, and the workers to start.

    Raises `UsageError` for a file Prefect would misunderstand, `CrosscalError` when the server did not take it.
    """
    server_needed("`crosscal deploy`")
    content = _checked(service, checkout)
    want = wanted(content, service, checkout)
    with get_client(sync_client=True) as client:
        before = deployed(client)
        found = list(differences(before, want))
        touched = {each.thing for each in found if each.thing in want}
        _make_pool(client, before, touched)
        _make_queues(client, before, want, touched)
        _prefect_deploy(content, [thing for thing in want if thing in touched], checkout)
        left = [each for each in differences(deployed(client), want) if each.thing in want]
    if left:
        raise CrosscalError(
            "the server did not take all of it",
            where=left[0].thing,
            got=f"{left[0].field} {left[0].deployed!r} instead of {left[0].wanted!r}",
            do="Look at the thing in the Prefect UI, remove it there, and deploy again.",
        )
    return {
        "made": sorted(touched - before.keys()),
        "changed": [each.as_json() for each in found if each.thing in touched & before.keys()],
        "unchanged": sorted(want.keys() - touched),
        "left alone": sorted(before.keys() - want.keys()),
        "workers": worker_commands(service, checkout),
    }


def worker_commands(service: ServiceConfig, checkout: Path) -> list[str]:
    """What to start, a shell command each: one worker for each GPU, and one that needs none."""
    places = {"CROSSCAL_CHECKOUT": str(checkout), "CROSSCAL_HOME": service.home}

    def command(name: str, device: str, limit: int, *queues: str) -> str:
        settings = {
            "PREFECT_API_URL": os.environ["PREFECT_API_URL"],
            "CUDA_VISIBLE_DEVICES": device,
            **places,
            **PROMPT,
        }
        assignments = " ".join(f"{key}={shlex.quote(value) if value else ''}" for key, value in settings.items())
        chosen = " ".join(f"--work-queue {queue}" for queue in queues)
        start = f"prefect worker start --pool {POOL} --type process {chosen} --limit {limit}"
        return f'env {assignments} {start} --name "$(hostname)-{name}"'

    gpus = [command(f"gpu{index}", str(index), 1, COMPRESS, f"gpu{index}") for index in range(service.gpus)]
    return [*gpus, command(SERVICE, "", SERVICE_RUNS, SERVICE)]


def _checked(service: ServiceConfig, checkout: Path) -> dict[str, Any]:
    check_plans(service, checkout)
    return read_deployments(checkout, service)


def _make_pool(client: SyncPrefectClient, before: Things, touched: set[str]) -> None:
    thing = f"pool {POOL}"
    if thing not in touched:
        return
    if thing not in before:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    elif before[thing]["type"] != "process":
        raise CrosscalError(
            "there is a work pool of this name and of another type",
            where=POOL,
            got=before[thing]["type"],
            do=f"Remove it (`prefect work-pool delete {POOL}`) if nothing else uses it.",
        )
    else:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))


def _make_queues(client: SyncPrefectClient, before: Things, want: Things, touched: set[str]) -> None:
    _use_default_queue(client)
    for thing in sorted(touched):
        kind, _, name = thing.partition(" ")
        if kind != "queue":
            continue
        limit = want[thing]["limit"]
        if thing in before or name == COMPRESS:
            queue = client.read_work_queue_by_name(name, work_pool_name=POOL)
            client.update_work_queue(queue.id, concurrency_limit=limit, is_paused=False)
        else:
            client.create_work_queue(name, concurrency_limit=limit, work_pool_name=POOL)


def _use_default_queue(client: SyncPrefectClient) -> None:
    """Every pool has a queue `default`, which would stand there as not ready for ever, for no worker asks for it: it
    becomes `compress`, or, in a pool that has both already, is paused."""
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=POOL)}
    default = queues.get("default")
    if default is not None and COMPRESS not in queues:
        client.update_work_queue(default.id, name=COMPRESS)
    elif default is not None and not default.is_paused:
        client.update_work_queue(default.id, is_paused=True)


def _prefect_deploy(content: Mapping[str, Any], things: list[str], checkout: Path) -> None:
    """`prefect deploy` over those deployments of the file that differ from what is deployed."""
    names = {thing.rpartition("/")[2] for thing in things if thing.startswith("deployment ")}
    if not names:
        return
    chosen = {**content, "deployments": [each for each in content["deployments"] if each["name"] in names]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "deployment.yaml")
        file.write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise CrosscalError("`prefect deploy` failed", got=" ".join(lines[-5:])[:1000])
