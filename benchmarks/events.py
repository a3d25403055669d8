"""Claim: with events repeated, reordered and lost, and a server restarted, each newest version is recompressed once.

    python benchmarks/events.py [--keep FOLDER] [--seed 0]

A real server, a worker and SQLite on loopback, deployed with `crosscal deploy`; the demo's model and a small draft of
`plans/landing.yaml`. Twenty files land for five domains; each landing is announced three times, all sixty announcements
shuffled. Halfway the server is killed, the announcements of two landings (all of one domain) are lost, and the server
is restarted. Once no run is active, the worker that runs the watch is started, which recovers the lost landings.
Counted: claims and outcomes in the ledger, run directories, models published, flow runs started and completed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml
from local_service import ROOT, deploy, environment, free_port, server, wait_for, workers
from records import record, write

from crosscal.files.streams import chunks
from crosscal.landing import Ledger, take_in
from crosscal.landing.runs import FINISHED
from crosscal.publication import Published
from crosscal.store import Store

LANDINGS = {"alpha": 5, "beta": 5, "gamma": 4, "delta": 4, "epsilon": 2}
LOST = "epsilon"
REPEATS = 3
DOCUMENTS = 24
WAIT_SECONDS = 900.0
DRAFT = (
    *("calibration.windows=8", "calibration.held_out_windows=4", "compress.0.alpha=[0.5]", "evaluate.windows=4"),
    "execution.device=cpu",
)
ANNOUNCE = """
import sys
from crosscal.tasks.announce import announce
for line in sys.stdin:
    domain, version = line.split()
    print(announce(domain, int(version)), flush=True)
"""


def land(folder: Path) -> None:
    """Write all files of all domains, each with its own texts, complete at once."""
    lines = b"".join(chunks(ROOT / "data/demo/corpora/biomedical/train.jsonl.zst")).splitlines()
    files = [(domain, number) for domain, count in LANDINGS.items() for number in range(count)]
    for index, (domain, number) in enumerate(files):
        place = folder / domain
        place.mkdir(parents=True, exist_ok=True)
        texts = lines[index * DOCUMENTS : (index + 1) * DOCUMENTS]
        (place / f"{number}.jsonl").write_bytes(b"\n".join(texts) + b"\n")
        (place / f"{number}.jsonl.done").touch()


class Announcer:
    """A process that announces as `crosscal ingest --announce` does; it reports a failure and goes on."""

    def __init__(self, shared: dict[str, str]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", ANNOUNCE], cwd=ROOT, env=shared, text=True, **pipes)

    def announce(self, domain: str, version: int) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(domain, version, file=self.process.stdin, flush=True)
        return self.process.stdout.readline() == "True\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def ask(api_url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    answer = httpx.get(f"{api_url}/{path}", timeout=60) if body is None else httpx.post(f"{api_url}/{path}", json=body)
    return answer.raise_for_status().json()


def make_small(api_url: str) -> None:
    """Make the deployment `recompress` run a small draft of its plan."""
    found = ask(api_url, "deployments/name/recompress/recompress")
    parameters = {**found["parameters"], "overrides": list(DRAFT)}
    httpx.patch(f"{api_url}/deployments/{found['id']}", json={"parameters": parameters}).raise_for_status()


def pause_watch(api_url: str, is_paused: bool) -> None:
    """Pause or resume the watch, so that it recovers nothing too early and no late runs pile up."""
    found = ask(api_url, "deployments/name/watch/watch")
    httpx.patch(f"{api_url}/deployments/{found['id']}", json={"paused": is_paused}).raise_for_status()


def flow_runs(api_url: str) -> list[dict[str, Any]]:
    """Return the flow runs that have a domain; those of the weekly sweep are only scheduled."""
    found = ask(api_url, "flow_runs/filter", {"flows": {"name": {"any_": ["recompress"]}}})
    return [run for run in found if run["parameters"].get("domain")]


def is_quiet(api_url: str) -> bool:
    """Return whether every run is over and none was added in 20 s (a burst triggers ten seconds late)."""
    runs = flow_runs(api_url)
    if any(run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") for run in runs):
        return False
    time.sleep(20)
    return bool(runs) and len(flow_runs(api_url)) == len(runs)


def events(seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return (events that arrive, shuffled; events announced while the server is down)."""
    all_ = [(domain, version) for domain, count in LANDINGS.items() for version in range(1, count + 1)] * REPEATS
    heard = [event for event in all_ if event[0] != LOST]
    random.Random(seed).shuffle(heard)
    return heard, [event for event in all_ if event[0] == LOST]


def write_service(folder: Path) -> Path:
    file = folder / "service.yaml"
    places = {name: str(folder / name) for name in ("landing", "home", "runs")}
    file.write_text(yaml.safe_dump({**places, "settle_seconds": 1, "watch": {"every_seconds": 15}}))
    return file


def count(store: Store, folder: Path, runs: list[dict[str, Any]]) -> dict[str, int]:
    """Count entries of the ledger, disk and server; raise `AssertionError` if ledger or store are wrong."""
    ledger = Ledger(store)
    claims = [run for domain in LANDINGS for run in ledger.runs(domain)[::-1]]
    finished = [run for run in claims if run.state in FINISHED]
    entries = [entry for domain in LANDINGS for entry in ledger.entries(domain)]
    assert {run.domain: run.version for run in finished} == LANDINGS, "the newest version of each"
    assert all(ledger.pending(domain) is None for domain in LANDINGS)
    assert [entry.state for entry in entries] == ["published"] * sum(LANDINGS.values())
    pointers = [Published(store).current(domain) for domain in LANDINGS]
    assert [pointer and pointer.corpus_version for pointer in pointers] == list(LANDINGS.values())
    assert not [problem for *_, problem in store.verify() if problem]
    return {
        "claims": len(claims),
        "finished recompressions": len(finished),
        "run directories": len(list((folder / "runs").rglob("identity.json"))),
        "moves of a published pointer": sum(len(Published(store).history(domain)) for domain in LANDINGS),
        "flow runs": len(runs),
        "flow runs completed": sum(run["state_type"] == "COMPLETED" for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="Work in this folder and leave it there.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        shared = environment(folder, free_port())
        store, api_url = Store(folder / "home"), shared["PREFECT_API_URL"]
        land(folder / "landing")
        assert len(take_in(store, str(folder / "landing"))) == sum(LANDINGS.values())
        heard, lost = events(options.seed)
        with server(folder, shared):
            commands = deploy(shared, write_service(folder))["workers"]
            make_small(api_url)
            pause_watch(api_url, True)
            compress = [command for command in commands if "service" not in command]
            stack.enter_context(workers(folder, shared, compress))
            announcer = Announcer(shared)
            stack.callback(announcer.close)
            started = time.monotonic()
            assert all(announcer.announce(*event) for event in heard[: len(heard) // 2])
        assert not any(announcer.announce(*event) for event in lost)
        print(f"server killed; {len(lost)} announcements lost", flush=True)
        stack.enter_context(server(folder, shared))
        assert all(announcer.announce(*event) for event in heard[len(heard) // 2 :])
        wait_for(lambda: is_quiet(api_url), WAIT_SECONDS, every=1)
        assert Ledger(store).pending(LOST) == LANDINGS[LOST], "nobody heard of it"
        pause_watch(api_url, False)
        (folder / "watch").mkdir()
        stack.enter_context(workers(folder / "watch", shared, [each for each in commands if each not in compress]))
        wait_for(lambda: Ledger(store).pending(LOST) is None, WAIT_SECONDS, every=0.5)
        seconds = time.monotonic() - started
        wait_for(lambda: is_quiet(api_url), WAIT_SECONDS, every=1)
        found = count(store, folder, flow_runs(api_url))
    print(json.dumps(found))
    case = f"{sum(LANDINGS.values())} landings of {len(LANDINGS)} domains, announced {REPEATS} times"
    told = {"announcements that arrived": len(heard), "announcements lost": len(lost), **found}
    rows = [record(case, name, value, "") for name, value in told.items()]
    write("events", [*rows, record(case, "from the first announcement to the last domain published", seconds, "s")])


if __name__ == "__main__":
    main()
