"""A failure that would repeat is not retried; what a user requests again is carried out, whatever the ledger states."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from crosscal.corpora import ingest
from crosscal.errors import (
    CorpusError,
    ModelError,
    NotPositiveDefinite,
    PlanError,
    StoreFull,
    UnsupportedModel,
    UsageError,
)
from crosscal.flows.landed import repeats_itself
from crosscal.flows.recompress import recompress
from crosscal.landing import Ledger
from crosscal.publication import Published
from crosscal.store import Store
from tests.helpers.tiny_place import Place, crosscal, make_place, write_documents
from tests.helpers.tiny_text import tiny_llama

LEGAL = "legal"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    place.write_plan(
        corpora={"general": "general", "$domain": {}},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "$domain"}],
        publish={"domain": "$domain", "tolerance": 0.5},
    )
    ask(place, place.folder / "legal")
    return place


def ask(place: Place, source: Path) -> None:
    store = Store(place.home)
    Ledger(store).request(LEGAL, ingest(store, LEGAL, [str(source)]).corpus.version)


def go(place: Place, *overrides: str, again: bool = False) -> dict[str, Any]:
    return recompress.fn(str(place.plan), list(overrides), str(place.home), str(place.folder / "runs"), LEGAL, again)


@pytest.mark.parametrize(
    ("error", "repeats"),
    [
        (PlanError("no such field"), True),
        (CorpusError("nothing usable"), True),
        (UnsupportedModel("a module nobody knows"), True),
        (NotPositiveDefinite("a Hessian"), True),
        (StoreFull("the disk is full"), False),
        (OSError("input/output error"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error"), False),
    ],
)
def test_repeating_errors_are_distinguished_from_transient_ones(error: Exception, repeats: bool) -> None:
    assert repeats_itself(error) == repeats
    caused = ModelError("the hub did not give it")
    caused.__cause__ = error
    assert repeats_itself(caused) == (not isinstance(error, OSError | MemoryError | StoreFull))


@pytest.mark.slow
def test_repeating_failure_gives_up_version_until_requested_again(place: Place) -> None:
    with pytest.raises(UsageError, match="no such variant"):
        go(place, "publish.variant=nonsense")
    assert re.search(r"legal v1 was given up: .*no such variant", go(place)["message"])
    assert [run.state for run in Ledger(Store(place.home)).runs(LEGAL)] == ["failed"]
    assert [run["outcome"] for run in go(place, again=True)["runs"]] == ["published"]


@pytest.mark.slow
def test_asked_for_again_it_is_carried_out_and_decided_again_also_after_a_rollback(place: Place) -> None:
    """Nothing undoes a rollback automatically; if a user asks again, the decision is made again."""
    first, store = go(place)["runs"][0], Store(place.home)
    write_documents(place.folder / "more.jsonl", seed="more", count=10)
    ask(place, place.folder / "more.jsonl")
    second = go(place)["runs"][0]
    assert second["outcome"] == "published"
    Published(store).roll_back(LEGAL, "now")
    assert go(place)["runs"] == []
    again = go(place, again=True)
    assert [run["outcome"] for run in again["runs"]] == ["published"]
    assert again["runs"][0]["record"]["calibration_tokens_read"] == 0
    moves = Published(store).history(LEGAL)
    assert [move.model for move in moves] == [each["model"] for each in (first, second, first, second)]
    assert Ledger(store).pending(LEGAL) is None


@pytest.mark.slow
def test_a_new_base_model_is_carried_out_from_the_command_line_once(place: Place) -> None:
    """The run gets a directory beside that of the earlier run of the same version, which is left as it is."""
    arguments = "run", str(place.plan), "--domain", LEGAL, "--home", str(place.home), "--json"
    out = "--out", str(place.folder / "runs")

    def runs() -> list[dict[str, Any]]:
        done = crosscal(*arguments, *out)
        assert done.code == 0, done.err
        return json.loads(done.out)["runs"]

    first, none = runs(), runs()
    assert none == []
    tiny_llama(place.folder / "model", seed=7)
    second, none = runs(), runs()
    assert none == []
    assert [Path(each[0]["run_dir"]).name for each in (first, second)] == ["legal-v1", "legal-v1-run2"]
    assert first[0]["record"]["model"] != second[0]["record"]["model"]
    assert [run.request.get("why") for run in Ledger(Store(place.home)).runs(LEGAL)] == [None, "the model changed"]
