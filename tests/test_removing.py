"""Documents removed from a domain: later results equal those of a store that never contained them, and none of their
text is left in the store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from crosscal.calibration import WindowRequest, draw_pool
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import ingest, load_corpus
from crosscal.corpora.removing import search, take_out
from crosscal.flows.recompress import recompress
from crosscal.flows.taken_out import discard_taken_out
from crosscal.landing import Ledger, take_in
from crosscal.stages.folding import unfolded
from crosscal.stages.sample import Sample, sums_of
from crosscal.store import Store
from tests.helpers.tiny_place import Outcome, Place, crosscal, make_place, write_documents
from tests.helpers.tiny_text import tiny_tokenizer

pytestmark = pytest.mark.slow

SECRET = "the quick brown zebra signs its name"
FILES = {"train-1.jsonl": 30, "train-2.jsonl": 30, "train-3.jsonl": 30, "dev.jsonl": 20, "test.jsonl": 20}
QUESTIONS = {"continuation": "$domain", "questions": 5, "words": 3, "context_words": 5}
WRONG = {"train-1.jsonl": "one wrong line", "dev.jsonl": "another"}
"""File -> the other words of the document with the secret that it contains."""


def land(place: Place, name: str, *, with_secret: bool) -> Path:
    """Fill the landing place of a store and ingest it; return the landing place."""
    landing = place.folder / f"landing-{name}" / "legal"
    landing.mkdir(parents=True)
    for file, count in FILES.items():
        write_documents(landing / file, seed=file, count=count)
        if with_secret and file in WRONG:
            with (landing / file).open("a") as stream:
                stream.write(json.dumps({"text": f"{SECRET} {WRONG[file]} " + SECRET * 20}) + "\n")
    take_in(Store(place.folder / name), str(landing.parent), 0)
    return landing.parent


def carry_out(place: Place, name: str) -> dict[str, Any]:
    return go(place, name)["runs"][0]


def go(place: Place, name: str, *, again: bool = False) -> dict[str, Any]:
    where = str(place.folder / name), str(place.folder / f"runs-{name}")
    return recompress.fn(str(place.plan), [], *where, "legal", again)


def made_of(run: dict[str, Any]) -> list[Any]:
    """Return all windows of a run, by keys and weights, independent of the version's number."""
    return json.loads((Path(run["run_dir"]) / "identity.json").read_text())["sets"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """`clean`, a store that never contained the secret, and `wrong`, one that does; each with a finished run."""
    place = make_place(tmp_path_factory.mktemp("removing"))
    place.write_plan(
        corpora={"general": "general", "$domain": {}},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "$domain", "alpha": 0.5}],
        calibration={"windows": 1000, "length": 32, "held_out_windows": 4},
        evaluate={
            "windows": 4,
            "tasks": [QUESTIONS],
            "allow_leaks": True,
        },
        publish={"domain": "$domain", "tolerance": 0.5},
    )
    for name in ("clean", "wrong"):
        land(place, name, with_secret=name == "wrong")
        carry_out(place, name)
    return place


@pytest.fixture
def home(place: Place, tmp_path: Path) -> Path:
    """A copy of the store that contains the secret."""
    shutil.copytree(place.folder / "wrong", place.folder / tmp_path.name)
    return place.folder / tmp_path.name


def asked(home: Path, *arguments: str) -> Outcome:
    return crosscal("domain", *arguments, "--home", str(home))


def texts(home: Path, place: Place) -> Iterator[tuple[Path, str]]:
    """Yield every file of a store, and its content as text: decompressed, and tokens decoded."""
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    for file in (file for file in home.rglob("*") if file.is_file()):
        if file.suffix == ".arrow":
            with pa.OSFile(str(file)) as source:
                table = pa.ipc.open_file(source).read_all()
            yield file, "\n".join(str(column.to_pylist()) for column in table.columns)
            if "tokens" in table.column_names:
                yield file, tokenizer.decode([token for row in table.column("tokens").to_pylist() for token in row])
        elif file.name == "pool.json":
            yield file, tokenizer.decode(json.loads(file.read_text())["rest"])
        else:
            yield file, file.read_bytes().decode("utf-8", "replace")


def kinds_with_secret(home: Path, place: Place, words: str = "zebra signs") -> set[str]:
    found = {file for file, text in texts(home, place) if words in text}
    return {file.relative_to(home).parts[1] for file in found}


def test_what_is_made_afterwards_is_what_a_store_makes_that_never_held_them(place: Place, home: Path) -> None:
    store, clean = Store(home), Store(place.folder / "clean")
    assert load_corpus(store, "legal").digest != load_corpus(clean, "legal").digest
    assert kinds_with_secret(home, place) >= {"corpora", "calibration", "overlaps"}
    shown = asked(home, "remove", "legal", "--containing", SECRET)
    assert (shown.code, "removed_documents: 2" in shown.out) == (2, True)
    assert load_corpus(store, "legal").version == 5, "without --yes nothing is done"
    assert asked(home, "remove", "legal", "--containing", SECRET, "--yes").code == 0
    assert load_corpus(store, "legal").version == 6
    assert load_corpus(store, "legal").digest == load_corpus(clean, "legal").digest
    assert kinds_with_secret(home, place) == set(), "nothing in the store holds the text, compressed or as tokens"

    assert Ledger(store).pending("legal") == 6
    run = carry_out(place, home.name)
    assert made_of(run) == made_of(go(place, "clean", again=True)["runs"][0])
    assert kinds_with_secret(home, place) == set()
    assert list(discard_taken_out(store)) == [], "what is made anew is clean, and stays"
    assert all(problem is None for *_, problem in store.verify())


def test_sets_joined_from_theirs_are_removed_too(tmp_path: Path) -> None:
    store, tokenizer, joined = Store(tmp_path / "home"), tiny_tokenizer(), {}
    for name in ("legal", "other"):
        for number in range(3):
            file = tmp_path / f"{name}-{number}.jsonl"
            write_documents(file, seed=file.stem, count=20)
            if (name, number) == ("legal", 0):
                file.write_text(file.read_text() + json.dumps({"text": SECRET * 20}) + "\n")
            corpus = ingest(store, name, [str(file)], split="train").corpus
        sums = sums_of(draw_pool(store, corpus.shards, tokenizer, "t", WindowRequest(1000, 32)), 1)
        joined[name] = unfolded(store, Sample(name, 0, sums, sums)).calibration.apart[0].key
    found = {each.digest for each in search(store, load_corpus(store, "legal"), containing=SECRET)}
    take_out(store, "legal", found)
    assert list(discard_taken_out(Store(store.location)))
    kept = {artifact.key for artifact in store.list("calibration")}
    assert not any(SECRET in text for key in kept for text in tokenizer.batch_decode(windows_by_key(store, key)))
    assert joined["other"] in kept


def test_only_windows_that_change_are_read_again(place: Place, home: Path) -> None:
    """A wrong file landed, then a right one, whose windows begin with tokens left over from the wrong one."""
    legal, other = place.folder / "landing-more" / "legal", "hammers"
    legal.mkdir(parents=True)
    (legal / "train-8.jsonl").write_text(json.dumps({"text": f"{other} " * 60}) + "\n")
    write_documents(legal / "train-9.jsonl", seed="behind", count=5)
    assert len(take_in(Store(home), str(legal.parent), 0)) == 2
    carry_out(place, home.name)
    assert kinds_with_secret(home, place, other) == {"corpora", "calibration", "draws"}
    assert asked(home, "remove", "legal", "--file", "train-8.jsonl", "--yes").code == 0
    assert take_in(Store(home), str(legal.parent), 0) == []
    assert kinds_with_secret(home, place, other) == set()
    record = carry_out(place, home.name)["record"]
    assert 0 < record["calibration_tokens_read"] < record["calibration_tokens"] / 10


def test_it_does_not_come_back_by_itself_and_comes_back_by_hand(place: Place, home: Path) -> None:
    landing = place.folder / "landing-wrong"
    assert asked(home, "remove", "legal", "--file", "train-1.jsonl", "--yes").code == 0
    store, file = Store(home), landing / "legal" / "train-1.jsonl"
    assert take_in(store, str(landing), 0) == [], "the file lies where it lay"
    os.utime(file, (1, 1))
    again = landing / "legal" / "train-4.jsonl"
    shutil.copy(file, again)
    with again.open("a") as stream:
        stream.write(json.dumps({"text": "a new document, long enough to be one"}) + "\n")
    done = {one.name: (one.state, one.added_documents) for one in take_in(store, str(landing), 0)}
    again.unlink()
    assert done == {"train-1.jsonl": ("known", 0), "train-4.jsonl": ("ingested", 1)}
    version = load_corpus(store, "legal")
    assert version.documents("train") == 61
    done = crosscal("ingest", str(file), "--corpus", "legal", "--json", "--home", str(home))
    assert json.loads(done.out)["added_documents"] == 31


def test_data_in_use_is_removed_by_the_next_gc(place: Place, home: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("crosscal.store.local_home.LocalHome.in_use_since", lambda self: 0.0)
        assert asked(home, "remove", "legal", "--containing", SECRET, "--yes").code == 0
    assert kinds_with_secret(home, place) >= {"corpora", "calibration"}
    dry = crosscal("store", "gc", "--dry-run", "--home", str(home), "--json")
    removed = crosscal("store", "gc", "--home", str(home), "--json")
    assert json.loads(dry.out) == json.loads(removed.out) != []
    assert kinds_with_secret(home, place) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("remove", "legl"), "Did you mean `legal`?"),
        (("remove", "legal", "--file", "train-7.jsonl"), "no such file landed"),
        (("remove", "legal", "--document", "ab"), "too short to mean one document"),
        (("remove", "legal", "--document", "0" * 16), "no such document"),
        (("remove", "legal", "--containing", "nowhere said"), "no such document"),
        (("remove", "legal", "--containing", "x", "--file", "y"), "give one of"),
        (("remove", "legal", "--file", "", "--yes"), "an empty filter means no document"),
        (("remove", "legal", "--document", "", "--yes"), "too short to mean one document"),
        (("remove", "legal", "--containing", "", "--yes"), "an empty filter means no document"),
        (("remove", "legal"), "nothing was removed"),
        (("pause", "nobody"), "There are: legal."),
    ],
)
def test_mistakes_are_one_message(place: Place, arguments: tuple[str, ...], message: str) -> None:
    done = asked(place.folder / "wrong", *arguments)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    if "--yes" in arguments:  # a filter from an unset shell variable must not remove the whole domain
        assert [row["domain"] for row in json.loads(asked(place.folder / "wrong", "list", "--json").out)] == ["legal"]
