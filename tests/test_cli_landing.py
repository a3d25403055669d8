"""Command line of the service: ingest a landing folder, run a domain, publish its model, roll it back."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from crosscal.store import Store
from tests.helpers.tiny_place import Outcome, Place, crosscal, make_place, write_documents


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A place without the corpus `legal`, which is to land; the plan refers to it as $domain."""
    place = make_place(tmp_path)
    place.write_plan(
        corpora={"general": "general", "$domain": {}},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "$domain", "alpha": [0, 0.5]}],
        publish={"domain": "$domain", "tolerance": 0.5},
    )
    return place


def said(place: Place, *arguments: str) -> Any:
    """Return a command's JSON output. There is no server, so `--announce` must fail after printing its result."""
    done = asked(place, *arguments)
    assert done.code == ("--announce" in arguments), done.err
    assert ("no event could be sent" in done.err) == ("--announce" in arguments)
    return json.loads(done.out)


def asked(place: Place, *arguments: str) -> Outcome:
    return crosscal(*arguments, "--home", str(place.home), "--json")


def run_domain(place: Place) -> dict[str, Any]:
    return said(place, "run", str(place.plan), "--domain", "legal", "--out", str(place.folder / "runs"))


def test_from_landing_to_published_and_back(place: Place) -> None:
    landing = place.folder / "landing"
    (landing / "legal").mkdir(parents=True)
    (landing / "Legal Texts").mkdir()
    for split in ("train", "validation", "test"):
        (place.folder / "legal" / f"{split}.jsonl").rename(landing / "legal" / f"{split}.jsonl")
    rows = said(place, "ingest", "--landing", str(landing), "--settle", "0", "--announce")
    assert sorted(row["state"] for row in rows) == ["ingested", "ingested", "ingested", "refused"]
    found = said(place, "ledger")
    assert [(row["domain"], row["version"], row["state"]) for row in found["domains"]] == [("legal", 3, "waiting")]
    assert [each["name"] for each in found["refused"]] == ["Legal Texts"]

    first = run_domain(place)
    assert first["message"].startswith("legal v3: ")
    assert "published: the first model of this domain" in first["message"]
    assert run_domain(place)["message"] == "nothing is pending for legal: v3 is published"

    write_documents(place.folder / "more.jsonl", seed="more", count=20)
    added = said(place, "ingest", str(place.folder / "more.jsonl"), "--corpus", "legal", "--announce")
    assert (added["version"], added["announced"]) == (4, {"legal": False})
    second = run_domain(place)["runs"][0]
    assert second["outcome"] == "published"
    assert second["record"]["calibration_tokens_read"] < second["record"]["calibration_tokens"] / 2

    shown = said(place, "publish", "legal")
    assert (shown["move"], shown["corpus_version"], shown["model"]) == (2, 4, second["model"])
    assert shown["perplexity"]["published"] is not None
    back = said(place, "publish", "legal", "--rollback", "--to", str(place.folder / "out"))
    assert back["model"] == first["runs"][0]["model"]
    assert [move["corpus_version"] for move in back["history"]] == [3, 4, 3]
    one, other = (
        AutoModelForCausalLM.from_pretrained(path) for path in (said(place, "publish", "legal")["path"], back["path"])
    )
    assert all(torch.equal(one.state_dict()[name], value) for name, value in other.state_dict().items())

    forth = said(place, "publish", "legal", "--to-move", "2")
    assert (forth["model"], forth["restored"]) == (second["model"], 2)
    assert run_domain(place)["runs"] == [], "a person's move is no reason for a run"
    kept = next(name for name in ("wanda-50-general", "wanda-50-legal-a0.5") if name != forth["variant"])
    by_hand = ("publish", "legal", "--variant", kept, "--run", second["run_dir"])
    assert said(place, *by_hand)["reason"] == "published by hand"
    assert asked(place, *by_hand).code == 2, "it is published"
    assert said(place, "publish", "legal", "--rollback")["model"] == second["model"], "and taken back"
    assert said(place, "publish", "legal", "--to-move", "5")["variant"] == kept
    assert [move["corpus_version"] for move in said(place, "publish", "legal")["history"]] == [3, 4, 3, 4, 4, 4, 4]

    weights = place.folder / "runs" / "legal-v3" / "models" / first["runs"][0]["variant"] / "block-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    torn = asked(place, "publish", "legal", "--variant", weights.parent.name, "--run", str(weights.parents[2]))
    assert (torn.code, "is not what the run wrote" in torn.err) == (1, True)
    (place.home / "objects" / "models" / second["model"] / "config.json").write_text("{}")
    torn = asked(place, "publish", "legal", "--to-move", "2")
    assert (torn.code, "cannot be published again" in torn.err) == (1, True)
    assert said(place, "publish", "legal")["move"] == 7, "the pointer has not moved"

    way = said(place, "ledger", "legal")
    assert [run["states"][-1]["state"] for run in way["runs"]] == ["published", "published"]
    steps = ["landed", "ingested", "claimed", "recompressed", "evaluated", "published"]
    assert [[line["state"] for line in file["states"]] for file in way["files"]] == [steps] * 4
    for command in (("ledger",), ("ledger", "legal"), ("publish", "legal")):
        assert crosscal(*command, "--home", str(place.home)).code == 0


def test_a_run_that_finds_too_little_text_says_so(place: Place) -> None:
    few = place.folder / "landing" / "legal" / "test.jsonl"
    few.parent.mkdir(parents=True)
    write_documents(few, seed="few", count=1)
    said(place, "ingest", "--landing", str(place.folder / "landing"), "--settle", "0")
    done = crosscal("run", str(place.plan), "--domain", "legal", "--home", str(place.home))
    assert done.code == 0, done.err
    assert "nothing new: the train split does not fill one window" in done.out


@pytest.mark.parametrize("command", [("gc", "--unused-days", "-3"), ("du", "--unused-days", "-1")])
def test_a_negative_age_is_refused(place: Place, command: tuple[str, ...]) -> None:
    done = crosscal("store", *command, "--home", str(place.home))
    assert (done.code, "--unused-days" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("publish", "legal"), "nothing is published for this domain"),
        (("publish", "legal", "--rollback"), "nothing is published for this domain"),
        (("publish", "../legal"), "not a valid name"),
        (("publish", "legal", "--to-move", "1"), "nothing is published for this domain"),
        (("publish", "legal", "--to-move", "1", "--rollback"), "give one of --rollback"),
        (("publish", "legal", "--variant", "x"), "give one of --rollback"),
        (("publish", "legal", "--variant", "x", "--run", "nowhere"), "not the directory of a finished run"),
        (("ledger", "legal"), "nothing of this domain has landed"),
        (("ingest",), "nothing to ingest"),
        (("ingest", "x.jsonl"), "nothing to ingest"),
        (("ingest", "--landing", "nowhere"), "the landing place is no folder"),
        (("ingest", "x.jsonl", "--landing", "nowhere"), "takes neither paths nor --corpus"),
    ],
)
def test_mistakes_are_one_message(place: Place, arguments: tuple[str, ...], message: str) -> None:
    Store(place.home).refs.append("corpora/other", 0, {})
    done = asked(place, *arguments)
    assert done.code in (1, 2)
    assert message in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        *("ledger", "ledger legal", "publish legal", "publish legal --rollback"),
        *(
            "domain list",
            "domain remove legal",
            "store list",
            "store verify",
            "store gc",
            "store gc --dry-run",
            "store du",
        ),
    ],
)
def test_a_wrong_store_is_an_error_and_none_is_made(place: Place, arguments: str) -> None:
    (place.folder / "other").mkdir()
    for wrong in ("nowhere", "other"):
        done = crosscal(*arguments.split(), "--home", str(place.folder / wrong), "--json")
        assert (done.code, done.out) == (2, "")
        assert f"{wrong}: there is no store here" in done.err
    assert not (place.folder / "nowhere").exists()
    assert not list((place.folder / "other").iterdir())


def test_plan_error_does_not_count_as_attempt(place: Place) -> None:
    said(place, "ingest", str(place.folder / "legal"), "--corpus", "legal", "--announce")
    done = asked(place, "run", str(place.plan), "--domain", "legal", "--set", "publish.variant=7")
    assert done.code == 2
    assert "only a domain is carried out again" in asked(place, "run", "--again").err
    assert said(place, "ledger", "legal")["runs"] == []


def test_asking_again_starts_the_attempts_anew(place: Place) -> None:
    ingest = ("ingest", str(place.folder / "legal"), "--corpus", "legal", "--announce")
    run = ("run", str(place.plan), "--domain", "legal", "--set", "publish.variant=nonsense")
    for _ in range(2):
        asked(place, *ingest)
        done = asked(place, *run)
        assert (done.code, "there is no such variant" in done.err) == (2, True)
        assert "was given up" in said(place, *run)["message"]
        assert said(place, "ledger")["domains"][0]["state"] == "given up"
    assert said(place, "ingest", *ingest[1:])["announced"] == {"legal": False}
    assert said(place, "ledger")["domains"][0]["state"] == "waiting"
    assert run_domain(place)["runs"][0]["outcome"] == "published"


def test_a_file_still_being_written_waits(place: Place) -> None:
    file = place.folder / "landing" / "legal" / "a.jsonl"
    file.parent.mkdir(parents=True)
    write_documents(file, seed="a", count=5)
    landing = ("ingest", "--landing", str(place.folder / "landing"))
    assert said(place, *landing) == []
    os.utime(file, (time.time() - 11, time.time() - 11))
    assert said(place, *landing)[0]["added_documents"] == 5
