"""Claim: the service runs automatically: a file in the landing folder becomes a published model without intervention.

    python benchmarks/landing.py [--watch-seconds 20] [--keep FOLDER]

A real server with an auth string, two workers and SQLite on loopback, deployed with `crosscal deploy`. Two domains of
the demo land one after the other, 99 % of their training documents first and then the last 1 %. Measured from the
moment the file is complete in its folder: until the flow run is created, until its body runs, until
`published/<domain>` points to a model made from it (or the ledger states that the old model was kept); and the
calibration tokens of each run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml
from local_service import PASSWORD, ROOT, WITH_PASSWORD, deploy, environment, free_port, server, wait_for, workers
from records import load_average, median_record, record, write

from crosscal.files.streams import chunks
from crosscal.landing import Ledger, Run
from crosscal.landing.runs import FINISHED
from crosscal.store import Store

DOMAINS = ("biomedical", "legal")
LANDED_SHARE = 0.01
RUN_SECONDS = 600.0


def documents(domain: str) -> tuple[bytes, bytes]:
    """Return the training documents of a demo domain: all but the last 1 %, and the last 1 %."""
    lines = b"".join(chunks(ROOT / "data/demo/corpora" / domain / "train.jsonl.zst")).splitlines()
    kept = len(lines) - max(1, round(LANDED_SHARE * len(lines)))
    return b"\n".join(lines[:kept]) + b"\n", b"\n".join(lines[kept:]) + b"\n"


def write_service(folder: Path, watch_seconds: int) -> Path:
    file = folder / "service.yaml"
    places = {name: str(folder / name) for name in ("landing", "home", "runs")}
    file.write_text(yaml.safe_dump({**places, "settle_seconds": 1, "watch": {"every_seconds": watch_seconds}}))
    return file


def land(folder: Path, name: str, content: bytes) -> float:
    """Write a file as a user would, then its marker; return when it was complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / f"{name}.done").touch()
    return time.time()


def finished(store: Store, domain: str, version: int) -> Run | None:
    last = Ledger(store).last_run(domain)
    return last if last is not None and last.state in FINISHED and last.version >= version else None


def flow_run(api_url: str, run_id: str) -> dict[str, Any]:
    return httpx.get(f"{api_url}/flow_runs/{run_id}", auth=PASSWORD, timeout=30).raise_for_status().json()


def seconds_since_1970(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment).timestamp()


def follow(api_url: str, store: Store, folder: Path, domain: str, version: int, content: bytes) -> dict[str, Any]:
    """Land a file and wait for the outcome of its version; return seconds from landing to each step, and tokens."""
    landed = land(folder / "landing" / domain, f"v{version}.jsonl", content)
    run = wait_for(lambda: finished(store, domain, version), RUN_SECONDS, every=0.2)
    seen = flow_run(api_url, run.run_id)
    made = json.loads(Path(run.states[-1]["run_dir"], "run.json").read_text())
    steps = {
        "landed to run created": seconds_since_1970(seen["created"]) - landed,
        "landed to body running": seconds_since_1970(seen["start_time"]) - landed,
        f"landed to {run.state}": seconds_since_1970(run.states[-1]["at"]) - landed,
    }
    return {"state": run.state, "steps": steps, "tokens": made["calibration_tokens_read"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch-seconds", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="Work in this folder and leave it there.")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        shared = environment(folder, free_port(), **WITH_PASSWORD)
        stack.enter_context(server(folder, shared))
        made = deploy(shared, write_service(folder, options.watch_seconds))
        stack.enter_context(workers(folder, shared, made["workers"]))
        store, api_url = Store(folder / "home"), shared["PREFECT_API_URL"]
        first, second = [], []
        for domain in DOMAINS:
            most, last = documents(domain)
            first.append(follow(api_url, store, folder, domain, 1, most))
            second.append(follow(api_url, store, folder, domain, 2, last))
            print(json.dumps([first[-1], second[-1]]))
        load = record("both", "load average meanwhile", load_average(), "processes")
    timed = [*rows("first landing", first), *rows("1 % more documents", second)]
    write("landing", [*timed, *shares(first, second), load])


def rows(case: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the domains; the spread is half the difference between them."""
    steps = dict.fromkeys(step for run in runs for step in run["steps"])
    found = {step: [run["steps"][step] for run in runs if step in run["steps"]] for step in steps}
    timed = [median_record(case, step, seconds, "s") for step, seconds in found.items()]
    return [*timed, median_record(case, "calibration tokens read", [run["tokens"] for run in runs], "tokens")]


def shares(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens of the second landing over those of the first pass (general and domain) and over the domain's part of it.

    The domain that lands second reuses the general corpus's moments, so its first pass is the domain's part alone.
    """
    most = max(run["tokens"] for run in second)
    whole, part = max(run["tokens"] for run in first), min(run["tokens"] for run in first)
    case = "1 % more documents"
    return [
        record(case, "tokens read over the first pass", most / whole, "ratio"),
        record(case, "tokens read over the domain's part of it", most / part, "ratio"),
    ]


if __name__ == "__main__":
    main()
