"""Laws of the ledger: one run at a time per domain, one finished run per version, nothing lost or stuck."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crosscal.errors import StoreError
from crosscal.landing import Ledger, Run
from crosscal.landing.items import LandedFile, Refusal
from crosscal.landing.ledger_view import MOST_FAILED, MOST_KILLED
from crosscal.landing.records import state
from crosscal.store import Store
from tests.helpers.processes import PROCESSES


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Store(tmp_path))


def claimed(ledger: Ledger, run_id: str = "one") -> Run:
    run = ledger.claim("legal", run_id)
    assert run is not None
    return run


def test_what_is_asked_for_is_pending_until_a_run_finishes_it(ledger: Ledger) -> None:
    assert ledger.pending("legal") is None
    assert ledger.claim("legal", "one") is None
    ledger.request("legal", 1)
    ledger.request("legal", 3)
    ledger.request("legal", 2)
    assert ledger.pending("legal") == 3
    run = claimed(ledger)
    assert (run.number, run.version, ledger.pending("legal")) == (1, 3, 3)
    ledger.mark(run, "recompressed")
    ledger.request("legal", 4)
    ledger.mark(run, "published")
    assert ledger.pending("legal") == 4
    ledger.mark(claimed(ledger), "kept", version=6, reason="worse")
    ledger.request("legal", 5)
    assert ledger.pending("legal") is None, "the last run used version 6 already"
    assert ledger.domains() == ["legal"]


def test_a_domain_is_claimed_once(ledger: Ledger) -> None:
    ledger.request("legal", 1)
    run = claimed(ledger)
    assert ledger.claim("legal", "two") is None
    assert ledger.holder("legal") == run
    with pytest.raises(StoreError, match="another process has closed"):
        ledger.mark(ledger.mark(run, "failed", reason="x"), "published")
    assert claimed(ledger, "two").number == 2


@pytest.mark.parametrize(("outcome", "most"), [("failed", MOST_FAILED), ("abandoned", MOST_KILLED)])
def test_a_version_is_given_up_after_so_many_attempts(ledger: Ledger, outcome: str, most: int) -> None:
    ledger.request("legal", 1)
    for _ in range(most):
        assert ledger.given_up("legal") is None
        ledger.mark(claimed(ledger), outcome)
    assert (ledger.pending("legal"), ledger.given_up("legal")) == (None, 1)
    assert ledger.claim("legal", "again") is None
    ledger.request("legal", 1)
    assert ledger.pending("legal") is None, "the same landing seen again changes nothing"
    ledger.request("legal", 1, again=True)
    assert ledger.pending("legal") == 1
    for _ in range(most):
        ledger.mark(claimed(ledger), outcome)
    ledger.request("legal", 2)
    assert ledger.pending("legal") == 2
    ledger.mark(claimed(ledger), "published")
    assert (ledger.pending("legal"), ledger.given_up("legal")) == (None, None)


def claim_and_stay(home: Path) -> None:
    Ledger(Store(home)).claim("legal", "killed")
    time.sleep(60)


def test_the_claim_of_a_killed_process_is_taken_over(ledger: Ledger, tmp_path: Path) -> None:
    ledger.request("legal", 1)
    process = PROCESSES.Process(target=claim_and_stay, args=(tmp_path,))
    process.start()
    while ledger.last_run("legal") is None:
        time.sleep(0.005)
    killed = ledger.last_run("legal")
    assert killed is not None
    assert ledger.holder("legal") == killed
    assert ledger.claim("legal", "two") is None, "its process can be seen to live"
    process.kill()
    process.join()
    assert ledger.holder("legal") is None
    assert claimed(ledger, "two").number == 2
    with pytest.raises(StoreError, match="another process has closed"):
        ledger.mark(killed, "published")


@pytest.mark.parametrize(("silent_hours", "is_taken"), [(0, False), (23, False), (25, True)])
def test_claim_without_heartbeat_expires_after_a_day(tmp_path: Path, silent_hours: float, is_taken: bool) -> None:
    refs = Store(tmp_path).refs
    refs.append("requests/legal", 0, {"version": 1, "after_run": 0, "at": _hours_ago(silent_hours)})
    begun = {"state": "claimed", "at": _hours_ago(silent_hours)}
    earlier = {"process": "elsewhere.1-7", "process_started": 1.0, "host": "elsewhere", "pid": 7}
    refs.append("recompressions/legal/00000001", 0, {"version": 1, "run_id": "one", **earlier, "states": [begun]})
    ledger = Ledger(Store(tmp_path))
    assert (ledger.holder("legal") is None) == is_taken
    assert (ledger.claim("legal", "two") is not None) == is_taken


def _hours_ago(hours: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - hours * 3600)).replace("Z", "+00:00")


def test_a_file_shares_the_way_of_the_run_that_used_it(ledger: Ledger) -> None:
    for number, name in enumerate(("a", "b", "c"), start=1):
        file, sha256 = LandedFile("legal", name, 1, 0.0), str(number) * 64
        ledger.record(file, sha256, state("landed"))
        ledger.record(file, sha256, state("ingested", version=number))
        ledger.record(file, sha256, state("ingested", version=9))
        ledger.request("legal", number)
        if number == 2:
            ledger.mark(claimed(ledger, "fails"), "failed")
            ledger.mark(claimed(ledger, "works"), "published")
    ways = {next(iter(entry.names)): entry for entry in ledger.entries("legal")}
    assert [ways[name].state for name in "abc"] == ["published", "published", "ingested"]
    assert [ways[name].version for name in "abc"] == [1, 2, 3]
    assert [line.get("run_id") for line in ways["a"].states] == [None, None, "works", "works"]
    claimed(ledger, "now")
    assert ledger.entries("legal")[2].state == "claimed"


def test_a_refusal_is_noted_once(ledger: Ledger) -> None:
    assert ledger.refuse(Refusal("legal", "x", "why"))
    assert not ledger.refuse(Refusal("legal", "x", "why"))
    assert [each["reason"] for each in ledger.refusals()] == ["why"]


@pytest.mark.parametrize("seed", range(6))
def test_announced_in_any_order_each_newest_version_is_done_once(tmp_path: Path, seed: int) -> None:
    """Landings and announcements from many threads: some repeated, some lost, all shuffled; then one watch."""
    chance = random.Random(seed)
    domains, versions = ("a", "b", "c"), 4
    at_work = {domain: threading.Lock() for domain in domains}

    def recompress(domain: str) -> None:
        ledger = Ledger(Store(tmp_path))
        while (run := ledger.claim(domain, f"run-{threading.get_ident()}")) is not None:
            assert at_work[domain].acquire(blocking=False), "two runs of one domain at once"
            time.sleep(chance.uniform(0, 0.01))
            ledger.mark(run, "recompressed")
            at_work[domain].release()
            ledger.mark(run, "published" if chance.random() < 0.8 else "kept")

    def land(domain: str) -> None:
        for version in range(1, versions + 1):
            Ledger(Store(tmp_path)).request(domain, version)
            time.sleep(chance.uniform(0, 0.02))

    events = [domain for domain in domains for _ in range(versions) for _ in range(chance.choice((0, 1, 3)))]
    work = [(land, domain) for domain in domains] + [(recompress, domain) for domain in events]
    chance.shuffle(work)
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(act, domain) for act, domain in work]:
            done.result()
    ledger = Ledger(Store(tmp_path))
    for domain in domains:
        if ledger.pending(domain) is not None:  # what a watch does
            recompress(domain)
        done = ledger.runs(domain)
        finished = [run.version for run in done]
        assert [run.number for run in done] == list(range(1, len(done) + 1))
        assert finished == sorted(set(finished))
        assert finished[-1] == versions
        assert ledger.pending(domain) is None


def claim_at(home: Path, start: float, won: multiprocessing.Queue[int], over: threading.Event) -> None:
    time.sleep(max(0.0, start - time.time()))
    run = Ledger(Store(home)).claim("legal", "x")
    won.put(run.number if run else 0)
    over.wait(60)  # the claim of an ended process could be taken over


def test_of_processes_that_claim_at_once_one_has_it(ledger: Ledger, tmp_path: Path) -> None:
    ledger.request("legal", 1)
    won: multiprocessing.Queue[int] = PROCESSES.Queue()
    start, over = time.time() + 1, PROCESSES.Event()
    processes = [PROCESSES.Process(target=claim_at, args=(tmp_path, start, won, over)) for _ in range(6)]
    for process in processes:
        process.start()
    assert sorted(won.get(timeout=30) for _ in processes) == [0, 0, 0, 0, 0, 1]
    over.set()
    for process in processes:
        process.join()
