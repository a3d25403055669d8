"""Commands of the workers: one process for each GPU, and one that needs none."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from pathlib import Path

from crosscal.errors import UsageError
from crosscal.flows.deployed import COMPRESS, POOL, SERVICE, SERVICE_RUNS
from crosscal.resources import ROOT
from crosscal.service import ServiceConfig

SETTINGS = {
    "DO_NOT_TRACK": "1",  # Prefect's client would send usage statistics
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # polling interval; the default is ten seconds
}


def worker_commands(service: ServiceConfig) -> list[str]:
    """Return the shell command of each worker to start."""
    url = {"PREFECT_API_URL": os.environ["PREFECT_API_URL"]}
    devices = {f"gpu{index}": str(index) for index in range(service.gpus)} | {SERVICE: ""}

    def command(name: str, device: str) -> str:
        settings = {**url, "CUDA_VISIBLE_DEVICES": device, "CROSSCAL_HOME": service.home}
        assignments = " ".join(f"{key}={shlex.quote(value) if value else ''}" for key, value in settings.items())
        return f"env {assignments} crosscal worker {name}"

    return [command(name, device) for name, device in devices.items()]


def worker(name: str) -> tuple[list[str], dict[str, str]]:
    """Return the command of a worker, `gpu0`, `gpu1`, … or `service`, and the environment variables to add.

    Variables that are already set stay, e.g. the device in a container that sees one GPU only. Raises `UsageError`.
    """
    if name != SERVICE and not re.fullmatch(r"gpu\d{1,2}", name):
        raise UsageError("no such worker", got=name, do="Give gpu0, gpu1, … or service.")
    if not os.environ.get("PREFECT_API_URL"):
        raise UsageError("a worker needs a Prefect server, and PREFECT_API_URL names none", do="Set it.")
    queues = [SERVICE] if name == SERVICE else [COMPRESS, name]
    limit = SERVICE_RUNS if name == SERVICE else 1
    start = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    chosen = [part for queue in queues for part in ("--work-queue", queue)]
    called = ["--limit", str(limit), "--name", f"{socket.gethostname()}-{name}"]
    # Working directory of runs. Never an installed package: Prefect puts it on a run's import path, and
    # crosscal/statistics would shadow Python's own module.
    folder = {"CROSSCAL_CHECKOUT": str(ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd())}
    device = {"CUDA_VISIBLE_DEVICES": "" if name == SERVICE else name.removeprefix("gpu")}
    own = {key: value for key, value in {**SETTINGS, **folder, **device}.items() if key not in os.environ}
    return [*start, *chosen, *called], own
