"""Claim: the service withstands daily operation: operators' actions and mishaps, on a real server, in sequence.

    python benchmarks/service_hour.py [--keep FOLDER]

A server with an auth string, two workers, SQLite and a receiver of webhooks on loopback, deployed with
`crosscal deploy` from a folder with its own plan and service file; the demo's model and corpora. Every step states its
expectations, which are checked where an operator would look: the ledger, the published pointer, the flow runs of the
server, the messages of the receiver. Exit status 1 if an expectation is not met.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from local_service import (
    PASSWORD,
    ROOT,
    WITH_PASSWORD,
    crosscal,
    deploy,
    environment,
    free_port,
    receiver,
    server,
    wait_for,
    workers,
)
from records import cpu_model, load_average, record, write
from safetensors.torch import load_file, save_file

from crosscal.corpora import load_corpus
from crosscal.corpora.removing import search
from crosscal.files.streams import chunks
from crosscal.landing import Ledger, Run
from crosscal.landing.runs import FINISHED
from crosscal.store import Store

DEMO = ROOT / "data" / "demo"
ONE, OTHER = "biomedical", "legal"
FILES = 150
WATCH_SECONDS, QUIET_WATCHES = 10, 3
RUN_SECONDS = 900.0
MIDDLE, HIGHEST = "a0.5", "the domain alone"
PLAN: dict[str, Any] = {
    "model": "model",
    "corpora": {"general": str(DEMO / "corpora" / "general"), "$domain": {}},
    "calibration": {"windows": 16, "length": 128, "held_out_windows": 2},
    "compress": [{"method": "sparsegpt", "sparsity": 0.7, "domain": "$domain", "alpha": [0.1, 0.5, 1]}],
    "evaluate": {"windows": 8, "validation_windows": 16},
    "execution": {"device": "cpu"},
    "publish": {"domain": "$domain", "guard": {"general": 0.3}, "tolerance": 0.5},
}
"""The guard accepts a middle alpha and not the domain alone; the tolerance lets a new model replace an equally good old
one, so that every step ends in an observable change."""
EVENTS = ("failed", "crashed", "given-up", "kept", "refused", "published")


@dataclass
class Hour:
    """The service and its expectations so far."""

    folder: Path
    shared: dict[str, str]
    messages: list[dict[str, Any]]
    """Messages that the receiver of webhooks got."""
    checks: list[tuple[str, str, bool]] = field(default_factory=list)
    """(step, expectation, whether it was met)."""
    step: str = ""

    @property
    def store(self) -> Store:
        return Store(self.folder / "home")

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store)

    def expect(self, what: str, is_so: bool, got: object = "") -> None:
        self.checks.append((self.step, what, bool(is_so)))
        print(f"  {'yes' if is_so else 'NO '}  {what}{'' if is_so else f' (got {got})'}", flush=True)

    def run(self, *arguments: str) -> Any:
        """Run a command; return its JSON, or its exit code and message."""
        done = crosscal(self.shared, *arguments, "--home", str(self.folder / "home"))
        try:
            return json.loads(done.stdout)
        except json.JSONDecodeError:
            return {"exit": done.returncode, "said": (done.stdout + done.stderr).strip()}

    def call(self, path: str, **content: Any) -> Any:
        """Return the server's answer; retry while its database (SQLite) is busy."""

        def ask() -> list[Any] | None:
            try:
                answer = httpx.post(f"{self.shared['PREFECT_API_URL']}/{path}", json=content, auth=PASSWORD, timeout=60)
            except httpx.TransportError:
                return None
            return None if answer.status_code == 503 else [answer.raise_for_status().json()]

        return wait_for(ask, RUN_SECONDS, every=1)[0]

    def flow_runs(self, flow: str) -> list[dict[str, Any]]:
        """Return the flow runs of a flow, newest first."""
        flows, wanted = {"name": {"any_": [flow]}}, {"expected_start_time": {"before_": "2100-01-01T00:00:00Z"}}
        return self.call("flow_runs/filter", flows=flows, flow_runs=wanted, sort="START_TIME_DESC", limit=200)

    def quiet_watches(self) -> None:
        """Wait until `QUIET_WATCHES` watches have begun and ended."""
        begun = time.time()

        def ended() -> bool:
            done = [run for run in self.flow_runs("watch") if run["state_type"] == "COMPLETED" and run["start_time"]]
            return sum(_seconds(run["start_time"]) > begun for run in done) >= QUIET_WATCHES

        wait_for(ended, RUN_SECONDS, every=2)

    def next_run(self, domain: str, after: int) -> Run:
        """Wait for the finished run of a domain with a number above `after`."""

        def look() -> Run | None:
            last = self.ledger.last_run(domain)
            return last if last is not None and last.number > after and last.state in FINISHED else None

        return wait_for(look, RUN_SECONDS, every=1)

    def last(self, domain: str) -> int:
        last = self.ledger.last_run(domain)
        return last.number if last else 0

    def at_work(self, domain: str) -> Run:
        """Wait for a run that has claimed the domain, and return it."""
        return wait_for(lambda: self.ledger.holder(domain), RUN_SECONDS, every=0.2)

    def told(self, *words: str) -> int:
        """Return the number of messages that contain all these words."""
        return sum(all(word in json.dumps(message) for word in words) for message in self.messages)


def _seconds(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment).timestamp()


def lines_of(domain: str) -> list[bytes]:
    return b"".join(chunks(DEMO / "corpora" / domain / "train.jsonl.zst")).splitlines()


def land(hour: Hour, domain: str, name: str, lines: Sequence[bytes]) -> Path:
    file = hour.folder / "landing" / domain / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def many_files(hour: Hour) -> None:
    for number, line in enumerate(lines_of(ONE)[:FILES]):
        land(hour, ONE, f"{number:03d}.jsonl", [line])
    run = hour.next_run(ONE, 0)
    wait_for(lambda: len(hour.ledger.entries(ONE)) >= FILES, RUN_SECONDS)
    hour.quiet_watches()
    entries, runs = hour.ledger.entries(ONE), hour.ledger.runs(ONE)
    hour.expect(f"{FILES} files are taken in", len(entries) == FILES, len(entries))
    hour.expect("at most three runs for all of them", len(runs) <= 3, len(runs))
    hour.expect("a model is published", run.state == "published", run.states[-1])
    published = hour.run("publish", ONE, "--json")
    hour.expect("it is that of the middle alpha", MIDDLE in published.get("variant", ""), published)


def bad_files(hour: Hour) -> None:
    whole = (DEMO / "corpora" / OTHER / "train.jsonl.zst").read_bytes()
    land(hour, OTHER, "column.jsonl", [json.dumps({"number": n}).encode() for n in range(20)])
    land(hour, OTHER, "broken.jsonl", [b"{not json"] * 5)
    (hour.folder / "landing" / OTHER / "cut.jsonl.zst").write_bytes(whole[: len(whole) // 2])

    def refused() -> dict[str, Any] | None:
        found = hour.run("ledger", "--json")
        return found if len(found.get("refused", [])) >= 2 else None

    found = {each["name"]: each["reason"] for each in wait_for(refused, RUN_SECONDS, every=2)["refused"]}
    for name in ("column.jsonl", "broken.jsonl"):
        hour.expect(f"{name} is refused, and the ledger says why", bool(found.get(name)), found)
    hour.next_run(OTHER, 0)
    cut = [each for each in hour.ledger.entries(OTHER) if "cut.jsonl.zst" in each.names]
    rejected = next((line.get("rejected") for line in cut[0].states if line["state"] == "ingested"), None)
    hour.expect("of cut.jsonl.zst what could be read is taken, and the ledger says so", "cut off" in str(rejected), cut)
    names = [run["name"] for run in hour.flow_runs("watch")]
    hour.expect("a watch is called by what it refused", any("refused" in name for name in names), Counter(names))
    wait_for(lambda: hour.told("refused") or None, 60)
    hour.expect("and a message told of it", hour.told("refused") > 0, hour.messages)


def a_cancel(hour: Hour) -> None:
    land(hour, OTHER, "first.jsonl", lines_of(OTHER)[:200])
    run = hour.at_work(OTHER)
    hour.call(f"flow_runs/{run.run_id}/set_state", state={"type": "CANCELLING"}, force=True)
    wait_for(lambda: hour.ledger.holder(OTHER) is None, RUN_SECONDS, every=1)
    hour.quiet_watches()
    last = hour.ledger.last_run(OTHER)
    hour.expect("the ledger says cancelled", last is not None and last.state == "cancelled", last)
    hour.expect("no watch starts it again", last is not None and last.number == run.number, last)
    land(hour, OTHER, "second.jsonl", lines_of(OTHER)[200:210])
    again = hour.next_run(OTHER, run.number)
    hour.expect("what lands next does, and is published", again.state == "published", again.states[-1])


def a_kill(hour: Hour) -> None:
    before = hour.last(ONE)
    land(hour, ONE, "more.jsonl", lines_of(ONE)[FILES : FILES + 100])
    run = hour.at_work(ONE)
    for process in flow_processes(hour, run.run_id):
        process.kill()
    again = hour.next_run(ONE, before)
    hour.expect("another run does the work of the killed one", again.number > run.number, again)
    closed = [each for each in hour.flow_runs("recompress") if each["id"] == run.run_id]
    hour.expect("the killed one is closed as crashed", closed[0]["state_type"] == "CRASHED", closed[0]["state_name"])
    hour.expect("the model of the new version stands", again.state == "published", again.states[-1])


def flow_processes(hour: Hour, run_id: str) -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("PREFECT__FLOW_RUN_ID") == run_id:
                found.append(one)
        except psutil.Error:
            continue
    return found


def a_pause(hour: Hour) -> None:
    before = hour.last(OTHER)
    hour.run("domain", "pause", OTHER)
    land(hour, OTHER, "paused.jsonl", lines_of(OTHER)[210:310])
    wait_for(lambda: hour.ledger.pending(OTHER), RUN_SECONDS, every=1)
    hour.quiet_watches()
    hour.expect("a paused domain takes files in and starts nothing", hour.last(OTHER) == before, hour.last(OTHER))
    hour.run("domain", "resume", OTHER)
    hour.expect("resumed, it goes on", hour.next_run(OTHER, before).state in FINISHED)


def a_new_model(hour: Hour) -> None:
    before = {domain: hour.last(domain) for domain in (ONE, OTHER)}
    weights = hour.folder / "model" / "model.safetensors"
    tensors = {name: 1.001 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights.with_suffix(".new"), metadata={"format": "pt"})
    weights.with_suffix(".new").replace(weights)
    for domain, number in before.items():
        run = hour.next_run(domain, number)
        hour.expect(f"{domain} is done again with it", run.state in ("published", "kept"), run.states[-1])


def a_changed_plan(hour: Hour) -> None:
    before = {domain: hour.last(domain) for domain in (ONE, OTHER)}
    write_plan(hour.folder, {**PLAN, "compress": [{**PLAN["compress"][0], "alpha": [0.1, 0.4, 1]}]})
    for domain, number in before.items():
        run = hour.next_run(domain, number)
        names = [path.name for path in Path(run.states[-1]["run_dir"], "models").iterdir()]
        hour.expect(f"{domain} is done again by it", any("a0.4" in name for name in names), names)


def a_rollback(hour: Hour) -> None:
    before, number = hour.run("publish", ONE, "--json"), hour.last(ONE)
    back = hour.run("publish", ONE, "--rollback", "--json")
    hour.expect("the model before stands", back["model"] != before["model"], back)
    hour.quiet_watches()
    kept = hour.run("publish", ONE, "--json")
    hour.expect("no watch undoes it", (kept["model"], hour.last(ONE)) == (back["model"], number), kept)
    undone = hour.run("publish", ONE, "--to-move", str(before["move"]), "--json")
    hour.expect("it can be taken back", undone["model"] == before["model"], undone)
    hour.expect("both are in the history", undone["move"] == before["move"] + 2, undone["history"])


def a_removal(hour: Hour) -> None:
    secret = f"ticket {random.Random(1).getrandbits(80):x}"
    number = hour.last(OTHER)
    file = land(
        hour, OTHER, "wrong.jsonl", [json.dumps({"text": f"{secret} number {n}. " * 40}).encode() for n in range(30)]
    )
    hour.next_run(OTHER, number)
    number = hour.last(OTHER)
    said = hour.run("domain", "remove", OTHER, "--file", file.name, "--yes", "--json")
    hour.expect("the file's documents are taken out", said.get("removed_documents") == 30, said)
    hour.next_run(OTHER, number)
    hour.quiet_watches()
    hour.run("store", "gc", "--json")
    hour.expect("none is in the store any more", not text_in_store(hour, secret), "some is")
    states = {name: entry.state for entry in hour.ledger.entries(OTHER) for name in entry.names}
    hour.expect("nor does the file come back", states.get(file.name) == "removed", states.get(file.name))


def text_in_store(hour: Hour, text: str) -> list[str]:
    """Return the digests of stored documents that contain a text."""
    corpus = load_corpus(hour.store, OTHER)
    return [each.digest for each in search(hour.store, corpus, containing=text)]


def the_end(hour: Hour) -> None:
    status = crosscal(hour.shared, "status", str(hour.folder / "service.yaml"), "--json")
    hour.expect("`crosscal status` finds nothing that fails", status.returncode == 0, status.stdout + status.stderr)
    for word in ("published", "refused"):
        hour.expect(f"messages told of: {word}", hour.told(word) > 0, hour.messages)
    check = crosscal(hour.shared, "deploy", str(hour.folder / "service.yaml"), "--check")
    hour.expect("`deploy --check` finds nothing changed", check.returncode == 0, check.stdout + check.stderr)
    damaged = [problem for _, _, problem in hour.store.verify() if problem]
    hour.expect("the store is whole", not damaged, damaged)


STEPS: dict[str, Callable[[Hour], None]] = {
    f"{FILES} files of one document": many_files,
    "a wrong column, a broken file, a cut archive": bad_files,
    "a cancel": a_cancel,
    "a kill": a_kill,
    "a pause": a_pause,
    "a new base model": a_new_model,
    "a changed plan": a_changed_plan,
    "a rollback and its undoing": a_rollback,
    "a removal": a_removal,
    "the end": the_end,
}


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    (folder / "landing.yaml").write_text(yaml.safe_dump(plan))


def set_up(folder: Path) -> Path:
    shutil.copytree(DEMO / "model", folder / "model")
    write_plan(folder, PLAN)
    file = folder / "service.yaml"
    said = {"landing": "landing", "home": "home", "runs": "runs", "plan": "landing.yaml", "settle_seconds": 1}
    notify = [{"webhook": "HOUR_WEBHOOK", "events": list(EVENTS)}]
    file.write_text(yaml.safe_dump({**said, "watch": {"every_seconds": WATCH_SECONDS}, "notify": notify}))
    return file


def rows(hour: Hour, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    for step in STEPS:
        found = [is_so for name, _, is_so in hour.checks if name == step]
        yield record(step, "expectations that came true", sum(found), f"of {len(found)}")
        yield record(step, "duration", seconds[step], "s")
    database = sum(file.stat().st_size for file in (hour.folder / "prefect").glob("prefect.db*"))
    yield record("whole", "messages received", len(hour.messages), "messages")
    yield record("whole", "watch runs", len(hour.flow_runs("watch")), "runs, 200 at most")
    yield record("whole", "Prefect's database", database / 1e6, "MB")
    yield record("whole", "load average", load_average(), "processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="Work in this new folder and leave it there.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ExitStack() as stack:
        folder = (options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        address, messages = stack.enter_context(receiver())
        shared = environment(folder, free_port(), **WITH_PASSWORD, HOUR_WEBHOOK=address)
        os.environ.pop("PREFECT_API_URL", None)
        stack.enter_context(server(folder, shared))
        made = deploy(shared, set_up(folder))
        stack.enter_context(workers(folder, shared, made["workers"]))
        hour, seconds = Hour(folder, shared, messages), {}
        for hour.step, take in STEPS.items():
            print(hour.step, flush=True)
            started = time.monotonic()
            take(hour)
            seconds[hour.step] = time.monotonic() - started
        found = list(rows(hour, seconds))
    write("service_hour", found, device=cpu_model())
    sys.exit(not all(is_so for *_, is_so in hour.checks))


if __name__ == "__main__":
    main()
