"""A changed plan or model makes a domain pending, once; checking that nothing changed costs almost nothing."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from crosscal.flows import changes
from crosscal.flows.changes import notice_changes
from crosscal.landing import Ledger
from crosscal.models.source import ModelSource
from crosscal.store import Store
from tests.helpers.counting_home import counting_store
from tests.helpers.tiny_place import Place, crosscal
from tests.helpers.tiny_text import tiny_llama


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A domain whose newest version is finished and whose plan and model are recorded."""
    place = Place(tmp_path)
    tiny_llama(tmp_path / "model")
    write(place)
    ledger = Ledger(Store(place.home))
    ledger.request("legal", 1)
    assert notice(place) == {}
    finish(ledger)
    assert notice(place) == {}
    return place


def write(place: Place, **changed: object) -> None:
    place.write_plan(corpora={"general": "general", "$domain": {}}, compress=[], **changed)


def notice(place: Place, *overrides: str, plan: Path | None = None, settle_seconds: float = 0.0) -> dict[str, str]:
    ledger = Ledger(Store(place.home))
    return notice_changes(ledger, plan or place.plan, overrides, settle_seconds=settle_seconds)


def finish(ledger: Ledger) -> None:
    run = ledger.claim("legal", "run")
    assert run is not None
    ledger.mark(run, "published")


def pending(place: Place) -> int | None:
    return Ledger(Store(place.home)).pending("legal")


def test_another_plan_is_seen_once_and_done_once(place: Place) -> None:
    write(place, evaluate={"windows": 7})
    assert notice(place) == {"legal": "the plan changed"}
    assert (pending(place), notice(place)) == (1, {})
    finish(Ledger(Store(place.home)))
    assert (pending(place), notice(place)) == (None, {})
    write(place)
    assert notice(place) == {"legal": "the plan changed"}, "back to what it was: what was made last is of another"


def test_what_changes_nothing_makes_nothing_pending(place: Place, tmp_path: Path) -> None:
    """A comment in the plan, a copy of plan and model elsewhere, file times, a file beside the weights."""
    place.plan.write_text(f"# a comment\n{place.plan.read_text()}")
    os.utime(place.folder / "model" / "config.json")
    (place.folder / "model" / "README.md").write_text("of no weight")
    assert notice(place) == {}
    shutil.copytree(place.folder / "model", tmp_path / "other" / "model")
    shutil.copy(place.plan, tmp_path / "other" / place.plan.name)
    assert notice(place, plan=tmp_path / "other" / place.plan.name) == {}, "another machine's checkout"
    assert pending(place) is None


def test_another_model_is_seen_once_its_files_have_settled(place: Place) -> None:
    tiny_llama(place.folder / "model", seed=1)
    assert notice(place, settle_seconds=60) == {}, "it may still be on its way"
    long_ago = time.time() - 61
    for file in (place.folder / "model").iterdir():
        os.utime(file, (long_ago, long_ago))
    assert notice(place, settle_seconds=60) == {"legal": "the model changed"}
    assert (pending(place), notice(place)) == (1, {})


def test_the_weights_are_read_once_and_nothing_while_nothing_changes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    open_ = ModelSource.open
    monkeypatch.setattr(ModelSource, "open", lambda path, *rest: opened.append(path) or open_(path, *rest))
    ledger = Ledger(Store(place.home))
    ledger.request("medical", 1)
    assert notice(place) == {}
    assert opened == [], "another domain's plan names the same model, whose digest is known"
    os.utime(place.folder / "model" / "model.safetensors")
    assert notice(place) == {}
    assert opened == [place.folder / "model"]
    store, asked = counting_store(place.home)
    with monkeypatch.context() as patch:
        patch.setattr(changes, "_written", None)  # fails if the plan is parsed or a model looked for
        assert notice_changes(Ledger(store), place.plan) == {}
    assert len(opened) == 1
    assert asked.keys() <= {"names", "read"}
    assert asked.total() <= 6


def test_a_plan_that_is_broken_and_mended_is_tried_again(place: Place) -> None:
    content = place.plan.read_text()
    place.plan.write_text("model: [")
    assert notice(place) == {"legal": "the plan changed"}
    ledger = Ledger(Store(place.home))
    run = ledger.claim("legal", "run")
    assert run is not None
    ledger.mark(run, "failed", repeats=True)
    assert (ledger.given_up("legal"), notice(place)) == (1, {})
    place.plan.write_text(content)
    assert notice(place) == {"legal": "the plan changed"}
    assert pending(place) == 1


def test_a_run_by_hand_with_another_plan_leaves_the_services_plan_as_it_was(place: Place) -> None:
    assert notice(place, "evaluate.windows=5") == {"legal": "another plan"}
    finish(Ledger(Store(place.home)))
    assert (notice(place), notice(place, "evaluate.windows=5"), pending(place)) == ({}, {}, None)


def test_a_ledger_of_an_earlier_version_is_taken_as_made_with_what_there_is(tmp_path: Path) -> None:
    place = Place(tmp_path)
    tiny_llama(tmp_path / "model")
    write(place)
    ledger = Ledger(Store(place.home))
    ledger.request("legal", 1)
    finish(ledger)
    assert (notice(place), pending(place)) == ({}, None)
    write(place, evaluate={"windows": 7})
    assert notice(place) == {"legal": "the plan changed"}


def test_while_it_is_paused_a_change_is_noted_and_waits(place: Place) -> None:
    ledger = Ledger(Store(place.home))
    ledger.pause("legal", is_paused=True)
    write(place, evaluate={"windows": 7})
    assert notice(place) == {"legal": "the plan changed"}
    assert ledger.claim("legal", "run") is None
    ledger.pause("legal", is_paused=False)
    finish(ledger)


@pytest.mark.parametrize("name", ["legl", "LEGAL", "nobody"])
def test_a_typo_in_the_domain_is_an_error_with_the_names_there_are(place: Place, name: str) -> None:
    done = crosscal("run", str(place.plan), "--domain", name, "--home", str(place.home))
    assert done.code == 2
    expected = {
        "legl": "Did you mean `legal`? There are: legal.",
        "nobody": "There are: legal.",
        "LEGAL": "not a valid",
    }
    assert expected[name] in done.err.splitlines()[-1]
