"""Laws of requests for runs and of user decisions: nothing cancelled or paused starts automatically."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosscal.landing import Ledger, Run
from crosscal.landing.items import LandedFile
from crosscal.landing.ledger_view import MOST_FAILED
from crosscal.landing.records import state
from crosscal.landing.status import overview, why_nothing
from crosscal.store import Store
from tests.helpers.tiny_place import crosscal


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(Store(tmp_path))
    ledger.record(LandedFile("legal", "a.jsonl", 1, 0.0), "1" * 64, state("ingested", version=1))
    ledger.request("legal", 1)
    return ledger


def claimed(ledger: Ledger, run_id: str = "one") -> Run:
    run = ledger.claim("legal", run_id)
    assert run is not None
    return run


def state_of(ledger: Ledger) -> str:
    (row,) = overview(ledger)
    return row["state"]


def test_asked_for_anew_a_version_that_was_finished_is_pending_until_a_later_run_finishes_it(ledger: Ledger) -> None:
    ledger.mark(claimed(ledger), "published")
    ledger.request("legal", 1, again=True)
    assert ledger.pending("legal") is None, "announced again: nothing new"
    ledger.request("legal", 1, anew="the plan changed")
    assert ledger.pending("legal") == 1
    run = claimed(ledger)
    assert run.request["why"] == "the plan changed"
    ledger.mark(run, "failed")
    assert ledger.pending("legal") == 1
    ledger.mark(claimed(ledger), "kept")
    assert ledger.pending("legal") is None


@pytest.mark.parametrize("lands", [False, True])
def test_what_changes_during_a_run_is_the_next_runs(ledger: Ledger, lands: bool) -> None:
    """The run read the plan before the change; also if documents landed as well and the run used them."""
    run = claimed(ledger)
    ledger.request("legal", 1, anew="the plan changed")
    if lands:
        ledger.request("legal", 2)
    ledger.mark(run, "published", version=2 if lands else 1)
    assert ledger.pending("legal") == 1 + lands
    ledger.mark(claimed(ledger), "published")
    assert ledger.pending("legal") is None


def test_a_failure_that_would_repeat_itself_gives_a_version_up_at_once(ledger: Ledger) -> None:
    ledger.mark(claimed(ledger), "failed", reason="no such variant", repeats=True)
    assert (ledger.pending("legal"), ledger.given_up("legal")) == (None, 1)
    assert "legal v1 was given up: no such variant" in why_nothing(ledger.look(), "legal")
    ledger.request("legal", 2)
    assert (ledger.pending("legal"), ledger.given_up("legal")) == (2, None)
    for _ in range(MOST_FAILED - 1):
        ledger.mark(claimed(ledger), "failed")
        assert ledger.given_up("legal") is None


@pytest.mark.parametrize("came_to", ["its queue", "a claim", "its death"])
@pytest.mark.parametrize("then", ["announced", "again", "a new version"])
def test_cancelled_by_a_person_it_waits_until_it_is_asked_for(ledger: Ledger, came_to: str, then: str) -> None:
    if came_to != "its queue":
        run = claimed(ledger, "the flow run")
        if came_to == "its death":
            ledger.mark(run, "abandoned")
    ledger.cancel("legal", "the flow run")
    ledger.cancel("legal", "the flow run")
    assert (ledger.pending("legal"), ledger.cancelled("legal")) == (None, 1)
    assert [run.state for run in ledger.runs("legal")] == ["cancelled"]
    assert ledger.claim("legal", "two") is None
    assert state_of(ledger) == "cancelled"
    assert "was cancelled" in why_nothing(ledger.look(), "legal")
    ledger.request("legal", 1)
    assert ledger.pending("legal") is None, "the same landing seen again changes nothing"
    version = 2 if then == "a new version" else 1
    ledger.request("legal", version, again=then == "announced", anew="by a user" if then == "again" else None)
    assert ledger.pending("legal") == version
    ledger.mark(claimed(ledger), "published")
    ledger.cancel("legal", "the flow run")
    assert ledger.last_run("legal").state == "published"  # type: ignore[union-attr]


def test_cancelling_a_run_leaves_a_newer_version_pending(ledger: Ledger) -> None:
    claimed(ledger, "the flow run")
    ledger.request("legal", 2)
    ledger.cancel("legal", "the flow run")
    assert ledger.pending("legal") == 2


def test_paused_a_domain_takes_files_in_and_keeps_what_waits(ledger: Ledger) -> None:
    home = ledger.store.location
    assert crosscal("domain", "pause", "legal", "--home", home).out == "legal is paused\n"
    assert crosscal("domain", "pause", "legal", "--home", home).out == "legal was paused\n"
    assert ledger.claim("legal", "one") is None
    ledger.request("legal", 2)
    assert (ledger.pending("legal"), state_of(ledger)) == (2, "paused")
    assert "legal is paused" in why_nothing(ledger.look(), "legal")
    assert crosscal("domain", "resume", "legal", "--home", home).out == "legal is resumed\n"
    assert claimed(ledger).version == 2
    ledger.pause("legal", is_paused=True)
    ledger.mark(ledger.runs("legal")[-1], "published")
    assert ledger.pending("legal") is None, "a run at work goes on to its end"


def test_removed_a_domain_is_gone_and_its_files_are_not_taken_again(ledger: Ledger) -> None:
    file = LandedFile("legal", "a.jsonl", 1, 0.0)
    ledger.mark(claimed(ledger), "published")
    ledger.pause("legal", is_paused=True)
    assert crosscal("domain", "remove", "legal", "--home", ledger.store.location).code == 2
    assert ledger.domains() == ["legal"], "nothing without --yes"
    assert crosscal("domain", "remove", "legal", "--yes", "--home", ledger.store.location).code == 0
    view = ledger.look()
    assert (view.domains(), view.runs("legal"), view.requested("legal")) == ([], [], None)
    assert (file.name, file.signature) in view.settled("legal")
    ledger.record(LandedFile("legal", "b.jsonl", 2, 0.0), "2" * 64, state("ingested", version=2))
    ledger.request("legal", 2)
    assert (claimed(ledger).number, ledger.domains()) == (1, ["legal"]), "what lands later begins anew"
    assert ledger.last_run("legal").state == "claimed"  # type: ignore[union-attr]
    assert crosscal("domain", "remove", "legal", "--yes", "--home", ledger.store.location).code == 2
    assert ledger.holder("legal") is not None, "not while a run is at work"
    ledger.mark(ledger.runs("legal")[-1], "kept")
    ledger.record(file, "1" * 64, state("ingested", version=3))
    states = {entry.sha256[0]: entry.state for entry in ledger.entries("legal")}
    assert states["1"] == "ingested", "brought back by hand"
