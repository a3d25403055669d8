"""Claim: whichever process is killed, the next run resumes, and the result is that of an undisturbed run.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--keep FOLDER]

A real server, a worker and SQLite on loopback; the demo's model, two of its corpora, five variants. Flow process,
worker and server are killed with SIGKILL in turn, each at a random moment of a run's body; the killed process is
restarted, and so is the run if it died. When a run completes, its store must verify, its run directory must contain
exactly the files of an undisturbed run, none half-written, and results and weights must be equal; then the next trial
starts in an empty store.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from local_service import ROOT, crosscal, environment, free_port, is_healthy, kill, wait_for
from records import cpu_model, load_average, record, write

from crosscal.store import Store

TARGETS = ("flow", "worker", "server")
STAGES = ("ingest", "sample", "moments", "solve", "evaluate", "report")
RUN_SECONDS = 300.0
START_SECONDS = 90.0
PLAN: dict[str, Any] = {
    "model": str(ROOT / "data/demo/model"),
    "corpora": {name: str(ROOT / "data/demo/corpora" / name) for name in ("general", "legal")},
    "calibration": {"windows": 16, "length": 128, "held_out_windows": 4},
    "compress": [
        {"method": "sparsegpt", "sparsity": [0.5, "2:4"], "domain": "legal", "alpha": [0.25, 0.75]},
        {"method": "wanda", "sparsity": 0.5, "upstream": "sequential"},
    ],
    "evaluate": {"windows": 8},
    "execution": {"device": "cpu"},
}
DEPLOYMENT = {
    "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
    "deployments": [
        {
            "name": "kills",
            "entrypoint": "flows/recompress.py:recompress",
            "work_pool": {"name": "kills"},
            "schedules": [],
        }
    ],
}
QUICK = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2"}
"""The worker polls every second and log lines arrive at once: less waiting between kills."""
MEASURED = ("variant", "corpus_or_task", "split", "metric", "value", "stderr", "tokens", "seed")


@dataclass
class Service:
    """Server and worker, which are restarted after a kill."""

    folder: Path
    shared: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        commands = {
            "server": ["server", "start", "--port", self.shared["PREFECT_SERVER_API_PORT"]],
            "worker": ["worker", "start", "--pool", "kills", "--type", "process", "--limit", "1"],
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *commands[name]],
                cwd=ROOT,
                env=self.shared,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if name == "server":
            wait_for(lambda: is_healthy(self.shared["PREFECT_API_URL"]), START_SECONDS)

    def kill(self, target: str) -> None:
        """Send SIGKILL to one process (for the server to its group, since the server is a child of its command)."""
        if target == "flow":
            for found in self.flow_processes():
                found.kill()
        elif target == "worker":
            os.kill(self.running[target].pid, signal.SIGKILL)
            self.running[target].wait()
        else:
            kill(self.running[target])

    def flow_processes(self) -> list[psutil.Process]:
        """Return the processes that run a flow run of this server, including orphans of a killed worker."""
        found = []
        for one in psutil.process_iter(["cmdline"]):
            try:
                is_flow = "-m prefect.engine" in " ".join(one.info["cmdline"] or ())
                if is_flow and one.environ().get("PREFECT_API_URL") == self.shared["PREFECT_API_URL"]:
                    found.append(one)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def stop(self) -> None:
        for found in self.flow_processes():
            found.kill()
        for process in self.running.values():
            kill(process)

    def call(self, path: str, **content: Any) -> Any:
        """Return the server's answer; retry while it starts or its database is busy (503)."""
        url = f"{self.shared['PREFECT_API_URL']}/{path}"

        def ask() -> list[Any] | None:
            try:
                answer = httpx.post(url, json=content, timeout=30) if content else httpx.get(url, timeout=30)
            except httpx.TransportError:
                return None
            return None if answer.status_code == 503 else [answer.raise_for_status().json()]

        return wait_for(ask, START_SECONDS, every=0.5)[0]

    def deploy(self) -> str:
        """Deploy the flow on its own pool and return the deployment's id."""
        file = self.folder / "deployment.yaml"
        file.write_text(yaml.safe_dump(DEPLOYMENT))
        for arguments in (
            ["work-pool", "create", "kills", "--type", "process"],
            ["--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
        ):
            command = [sys.executable, "-m", "prefect", *arguments]
            subprocess.run(command, cwd=ROOT, env=self.shared, check=True, capture_output=True)
        return self.call("deployments/name/recompress/kills")["id"]


@dataclass(frozen=True)
class Trial:
    """A store and a run directory, shared by the runs of one trial."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def seconds(self) -> float:
        """Return the seconds in stages of the last completed run."""
        return sum(json.loads((self.run_dir / "run.json").read_text())["stages"].values())

    def parameters(self) -> dict[str, str]:
        plan = self.folder / "plan.yaml"
        self.folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(yaml.safe_dump(PLAN))
        return {"plan_path": str(plan), "home": str(self.folder / "home"), "out": str(self.run_dir)}


class Run:
    """One flow run on the worker."""

    def __init__(self, service: Service, deployment: str, trial: Trial) -> None:
        self._service = service
        self.id: str = service.call(f"deployments/{deployment}/create_flow_run", parameters=trial.parameters())["id"]

    def state(self) -> str:
        return self._service.call(f"flow_runs/{self.id}")["state_type"]

    def stage(self) -> str:
        """Return the first stage whose end the run has not logged yet."""
        logs = self._service.call("logs/filter", logs={"flow_run_id": {"any_": [self.id]}}, limit=200)
        ended = {line["message"].partition(":")[0] for line in logs}
        return next((stage for stage in STAGES if stage not in ended), "last state")

    def wait_for_body(self) -> None:
        wait_for(lambda: self.state() not in ("SCHEDULED", "PENDING"), RUN_SECONDS)

    def wait_for_end(self) -> bool:
        """Wait until no process runs it; return whether it completed."""
        wait_for(lambda: not self._service.flow_processes(), RUN_SECONDS, every=0.3)
        return self.state() == "COMPLETED"


def undisturbed(service: Service, trial: Trial) -> float:
    """Run the plan without a server and without kills; return the seconds in its stages."""
    asked = trial.parameters()
    alone = {name: value for name, value in service.shared.items() if name != "PREFECT_API_URL"}
    done = crosscal(alone, "run", asked["plan_path"], "--home", asked["home"], "--out", asked["out"], "--json")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return sum(json.loads(done.stdout)["stages"].values())


def disturb(service: Service, run: Run, target: str, moment_seconds: float) -> str | None:
    """Kill and restart `target` at this time of the run's body; return the stage hit, None if the run was over."""
    run.wait_for_body()
    until = time.monotonic() + moment_seconds
    while time.monotonic() < until:
        if not service.flow_processes():
            return None
        time.sleep(max(0.0, min(0.2, until - time.monotonic())))
    stage = run.stage()
    if not service.flow_processes():
        return None
    service.kill(target)
    if target != "flow":
        service.start(target)
    return stage


def differences(trial: Trial, calm: Trial) -> list[str]:
    """Return differences from the undisturbed run: damaged artifacts, extra or missing files, values, weights."""
    found = [f"{kind} {key}: {problem}" for kind, key, problem in Store(trial.folder / "home").verify() if problem]
    mine, theirs = files_of(trial.run_dir), files_of(calm.run_dir)
    found += [f"file {name}" for name in mine.keys() ^ theirs.keys()]
    found += [f"weights {name}" for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]]
    return found if measured(trial) == measured(calm) else [*found, "results.jsonl"]


def files_of(run_dir: Path) -> dict[str, str]:
    """File -> digest if it belongs to a model, else empty."""
    names = sorted(file for file in run_dir.rglob("*") if file.is_file())
    return {str(file.relative_to(run_dir)): digest(file) if "models" in file.parts else "" for file in names}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def measured(trial: Trial) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (trial.run_dir / "results.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in MEASURED) for row in rows]


@dataclass
class Tally:
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(target, stage) → kills."""
    survived: Counter[str] = field(default_factory=Counter)
    """Target → runs that completed despite its kill."""
    trials: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.hits.values())


def carry_on(service: Service, folder: Path, kills: int, chance: random.Random) -> Tally:
    """Run trials until there were enough kills and the last trial has completed."""
    deployment, tally, calm = service.deploy(), Tally(), Trial(folder / "calm")
    body_seconds = undisturbed(service, calm)
    print(f"an undisturbed run's stages take {body_seconds:.1f} s", flush=True)
    while tally.kills < kills:
        trial, runs, has_completed = Trial(folder / f"trial{tally.trials}"), 0, False
        while not has_completed:
            run, target = Run(service, deployment, trial), TARGETS[tally.kills % len(TARGETS)]
            moment = chance.uniform(0, body_seconds)
            stage = disturb(service, run, target, moment) if tally.kills < kills else None
            runs, has_completed = runs + 1, run.wait_for_end()
            if stage is not None:
                tally.hits[target, stage] += 1
                tally.survived[target] += has_completed
                print(f"{tally.kills}: {target} in {stage}, completed: {has_completed}", flush=True)
        tally.trials += 1
        tally.differences += differences(trial, calm)
        if runs == 1:  # nothing was cached: the time of a whole run under the present load
            body_seconds = trial.seconds()
    return tally


def rows(tally: Tally, seconds: float) -> list[dict[str, Any]]:
    found = [record("all", "kills", tally.kills, "kills"), record("all", "completed trials", tally.trials, "trials")]
    found.append(record("all", "differences from the undisturbed run", len(tally.differences), "differences"))
    for target in TARGETS:
        hits = {stage: count for (name, stage), count in tally.hits.items() if name == target}
        found.append(record(target, "kills", sum(hits.values()), "kills"))
        found.append(record(target, "runs that completed all the same", tally.survived[target], "runs"))
        found += [
            record(target, f"kills in {stage}", hits[stage], "kills")
            for stage in (*STAGES, "last state")
            if stage in hits
        ]
    return [*found, record("all", "duration", seconds, "s"), record("all", "load average", load_average(), "processes")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Work in this folder and leave it there.")
    options = parser.parse_args()
    started = time.monotonic()
    with ExitStack() as stack:
        folder = (options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        service = Service(folder, environment(folder, free_port(), **QUICK))
        stack.callback(service.stop)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that server and worker are stopped
        service.start("server")
        service.start("worker")
        tally = carry_on(service, folder, options.kills, random.Random(options.seed))
    for difference in tally.differences:
        print(f"DIFFERENT: {difference}")
    write("kills", rows(tally, time.monotonic() - started), device=f"{cpu_model()}, 1 thread")
    sys.exit(bool(tally.differences))


if __name__ == "__main__":
    main()
