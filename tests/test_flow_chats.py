"""A run whose domain is chats: from a file to windows, numbers and a model, with the messages on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import load_corpus
from crosscal.store import Store
from tests.helpers.tiny_chats import chat_tokenizer, chats
from tests.helpers.tiny_place import Place, crosscal, make_place

CHATS = chats(90)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    lines = "".join(json.dumps({"id": n, "conversations": chat}) + "\n" for n, chat in enumerate(CHATS))
    (tmp_path / "chats.jsonl").write_text(lines)
    place.write_plan(
        corpora={"general": "general", "legal": {"path": "chats.jsonl"}},
        calibration={"windows": 8, "length": 64, "held_out_windows": 4},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "legal", "alpha": [0, 1]}],
    )
    return place


def give_template(place: Place, name: str) -> None:
    chat_tokenizer(name).save_pretrained(place.folder / "model")


def check(place: Place, *extra: str, code: int = 0) -> list[str]:
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json", *extra)
    assert done.code == code, done.err
    return json.loads(done.out)["problems"]


def test_a_domain_of_chats_from_file_to_numbers_and_again_for_another_template(place: Place) -> None:
    give_template(place, "begin-once")
    assert check(place) == []
    record = place.run()
    assert "legal: documents found: 90 in `conversations`." in record["notes"]
    rows = [json.loads(line) for line in (place.run_dir / "results.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows if row["corpus_or_task"] == "legal"} == {
        "dense", "wanda-50-general", "wanda-50-legal"
    }  # fmt: skip
    shown = json.loads((place.run_dir / "samples.json").read_text())
    assert all(each["text"].startswith("<s><pad>") for each in shown if each["corpus"] == "legal")
    store = Store(str(place.home))
    sets = [each for each in store.list("calibration") if "chat" in each.provenance]
    assert len(sets) == 2 + 4, "training and held-out windows; both splits that each corpus is measured on"
    for each in sets:
        assert (windows_by_key(store, each.key)[:, 0] == 0).all()
    give_template(place, "own-system")
    other = place.run("--out", str(place.folder / "other"))
    assert (other["corpora"]["legal"]["added"], other["corpora"]["legal"]["version"]) == (0, 1)
    assert 0 < other["calibration_tokens_read"] < other["calibration_tokens"], "windows of texts are those there were"


def test_a_model_without_a_template_is_refused_before_anything_is_read(place: Place) -> None:
    (problem,) = check(place, code=1)
    assert "corpora.legal" in problem
    assert "no chat template" in problem
    assert "Set `chat: text`" in problem
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(place.run_dir))
    assert (done.code, problem in done.err) == (1, True), done.err
    assert not list(Store(str(place.home)).list("moments"))
    assert check(place, "--set", "corpora.legal.chat=text") == []
    done = crosscal("run", str(place.plan), "--set", "corpora.legal.chat=words", "--home", str(place.home))
    assert done.code == 2
    assert "corpora.legal" in done.err


def test_ingest_says_what_it_found_and_landed_files_are_read_alike(place: Place) -> None:
    source, home = str(place.folder / "chats.jsonl"), ("--home", str(place.home))
    done = crosscal("ingest", source, "--corpus", "by-hand", *home, "--json")
    assert json.loads(done.out)["forms"] == {"conversations": 90}
    (place.folder / "landing" / "landed").mkdir(parents=True)
    (place.folder / "landing/landed/chats.jsonl").write_bytes(Path(source).read_bytes())
    done = crosscal("ingest", "--landing", str(place.folder / "landing"), "--settle", "0", *home)
    assert done.code == 0, done.err
    store = Store(str(place.home))
    assert load_corpus(store, "landed").digest == load_corpus(store, "by-hand").digest
    place.write_plan(corpora={"by-hand": None}, compress=[])
    (problem,) = check(place, code=1)
    assert "corpora.by-hand" in problem
