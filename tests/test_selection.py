"""Document selection: what it depends on, what it must not depend on, and what is stored."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from crosscal.corpora import Corpus, documents, ingest, load_corpus
from crosscal.corpora.corpus import digests
from crosscal.errors import CorpusError
from crosscal.selection import Selection, SelectionSettings, select
from crosscal.selection.choosing import KIND
from crosscal.selection.chosen import read_chosen
from crosscal.selection.export import write_chosen
from crosscal.store import Store
from tests.helpers.made_up_text import corpus_of, edited, made_up
from tests.helpers.tiny_place import crosscal

PLANTED = made_up("medicine", "planted", 12)
POOL = [*made_up("law", "pool", 60), *PLANTED]
SAMPLE = {"train": made_up("medicine", "sample", 20), "validation": made_up("medicine", "validation", 4)}
SAMPLE["test"] = made_up("medicine", "test", 4)
DSIR = SelectionSettings("dsir", documents=12)
ZIP_FIT = SelectionSettings("zip-fit", documents=12, targets=8)


@pytest.fixture
def pool(store: Store, tmp_path: Path) -> Corpus:
    held_out = {split: made_up("law", f"pool {split}", 3) for split in ("validation", "test")}
    return corpus_of(store, tmp_path, "pool", {"train": POOL, **held_out})


@pytest.fixture
def sample(store: Store, tmp_path: Path) -> Corpus:
    return corpus_of(store, tmp_path, "sample", SAMPLE)


def ranked(store: Store, selection: Selection) -> list[tuple[bytes, float | None]]:
    return read_chosen(store, KIND, selection.key)


def texts(store: Store, corpus: Corpus, split: str) -> set[str]:
    return {text for shard in corpus.shards for text in documents(store, shard, split)}


@pytest.mark.parametrize("settings", [DSIR, ZIP_FIT])
def test_planted_documents_are_found(store: Store, pool: Corpus, sample: Corpus, settings: SelectionSettings) -> None:
    found = select(store, "chosen", pool, sample, settings)
    assert len(texts(store, found.corpus, "train") & set(PLANTED)) >= 11
    scores = [score for _, score in ranked(store, found)]
    assert len(scores) == 12 == found.counts["chosen"]
    by_chance = select(store, "any", pool, None, SelectionSettings(documents=12))
    assert len(texts(store, by_chance.corpus, "train") & set(PLANTED)) <= 6
    assert all(score is None for _, score in ranked(store, by_chance))


@pytest.mark.parametrize("settings", [DSIR, ZIP_FIT])
def test_scores_ignore_the_samples_held_out_documents(
    store: Store, pool: Corpus, sample: Corpus, settings: SelectionSettings, tmp_path: Path
) -> None:
    """Replacing medicine by law in the sample's validation and test splits changes no chosen document and no score."""
    poison = {"validation": made_up("law", "poison", 40), "test": made_up("law", "more poison", 40)}
    poisoned = corpus_of(store, tmp_path, "poisoned", {"train": SAMPLE["train"], **poison})
    clean, other = (select(store, "chosen", pool, one, settings) for one in (sample, poisoned))
    assert clean.key != other.key
    assert ranked(store, clean) == ranked(store, other)


def test_scores_do_without_the_files_of_other_splits(
    store: Store, pool: Corpus, sample: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for corpus in (pool, sample):
        for shard in corpus.shards:
            for split in shard.documents.keys() - {"train"}:
                (tmp_path / "home" / "objects" / "corpora" / shard.key / f"{split}.arrow").write_bytes(b"poison")
    scored = []

    def stop(*given: object) -> None:
        scored.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("crosscal.selection.choosing.ordered", stop)
    for settings in (DSIR, ZIP_FIT):
        with pytest.raises(KeyboardInterrupt):
            select(store, "chosen", pool, sample, settings)
    assert len(scored) == 2


def test_what_is_held_out_anywhere_is_not_chosen(store: Store, pool: Corpus, sample: Corpus, tmp_path: Path) -> None:
    leaked = {
        "validation": [PLANTED[0], edited(PLANTED[1], 0.01, "leak")],
        "test": [PLANTED[2].upper(), edited(PLANTED[3], 0.5, "no leak")],
    }
    other = corpus_of(store, tmp_path, "other", {"train": made_up("law", "other", 5), **leaked})
    found = select(store, "chosen", pool, sample, DSIR, held_out=[other])
    chosen = texts(store, found.corpus, "train")
    assert not chosen & set(PLANTED[:3])
    assert chosen >= set(PLANTED[3:])
    assert found.counts["held_out"] >= 3
    assert found.counts["chosen"] == 12
    equal = SelectionSettings("dsir", documents=12, near_duplicates=None)
    found = select(store, "chosen", pool, sample, equal, held_out=[other])
    assert texts(store, found.corpus, "train") & set(PLANTED[:3]) == set(PLANTED[1:3])


def test_a_chosen_corpus_is_tested_on_the_samples_documents(store: Store, pool: Corpus, sample: Corpus) -> None:
    found = select(store, "chosen", pool, sample, DSIR).corpus
    assert found == load_corpus(store, "chosen")
    for split in ("validation", "test"):
        assert texts(store, found, split) == set(SAMPLE[split])
    distinct = select(store, "distinct", pool, None, SelectionSettings()).corpus
    assert texts(store, distinct, "test") == texts(store, pool, "test")
    assert texts(store, distinct, "train") == texts(store, pool, "train")
    (shard,) = found.shards
    assert shard.characters["train"] == sum(map(len, texts(store, found, "train")))


def test_the_same_is_not_chosen_twice(
    store: Store, pool: Corpus, sample: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = select(store, "chosen", pool, sample, DSIR)
    monkeypatch.setattr("crosscal.selection.choosing.dsir_scores", None)
    assert select(store, "chosen", pool, sample, DSIR) == first
    unused = SelectionSettings("dsir", documents=12, targets=3)  # only zip-fit uses `targets`
    assert select(store, "chosen", pool, sample, unused) == first


def test_a_pool_that_grows_is_chosen_from_anew(store: Store, pool: Corpus, sample: Corpus, tmp_path: Path) -> None:
    first = select(store, "chosen", pool, sample, DSIR)
    grown = corpus_of(store, tmp_path, "pool", {"train": made_up("medicine", "landed", 5)})
    assert len(grown.shards) == 2
    second = select(store, "chosen", grown, sample, DSIR)
    assert second.key != first.key
    assert second.corpus.version == 2
    assert second.counts["pool"] > first.counts["pool"]
    assert load_corpus(store, "chosen", 1) == first.corpus


@pytest.mark.parametrize("settings", [DSIR, ZIP_FIT, SelectionSettings(documents=30, seed=4)])
def test_selection_is_independent_of_landing_order(
    store: Store, sample: Corpus, settings: SelectionSettings, tmp_path: Path
) -> None:

    def landing(name: str, train: list[str], seed: str) -> Corpus:
        held_out = {split: made_up("law", f"{split} {seed}", 2) for split in ("validation", "test")}
        return corpus_of(store, tmp_path, name, {"train": train, **held_out})

    at_once = landing("at-once", POOL, "a")
    landing("in-parts", POOL[40:], "b")
    in_parts = landing("in-parts", POOL[:40], "c")
    assert len(in_parts.shards) == 2
    towards = sample if settings.method else None
    one, other = (select(store, "chosen", corpus, towards, settings) for corpus in (at_once, in_parts))
    assert [digest for digest, _ in ranked(store, one)] == [digest for digest, _ in ranked(store, other)]
    assert texts(store, one.corpus, "train") == texts(store, other.corpus, "train")


def test_other_seeds_draw_other_documents(store: Store, pool: Corpus, sample: Corpus) -> None:
    drawn = [select(store, "any", pool, None, SelectionSettings(documents=20, seed=seed)) for seed in range(3)]
    assert len({frozenset(texts(store, one.corpus, "train")) for one in drawn}) == 3


def test_short_documents_are_no_choice_of_dsir(store: Store, pool: Corpus, sample: Corpus, tmp_path: Path) -> None:
    short = made_up("medicine", "short", 10, words=60)
    grown = corpus_of(store, tmp_path, "pool", {"train": short})
    found = select(store, "chosen", grown, sample, DSIR)
    assert found.counts["too_short"] == len(texts(store, grown, "train") & set(short)) > 0
    assert not texts(store, found.corpus, "train") & set(short)
    with pytest.raises(CorpusError, match=r"no document is left to choose .* or lower `least_words` \(10000\)"):
        select(store, "chosen", pool, sample, SelectionSettings("dsir", documents=1, least_words=10_000))


def test_a_sample_without_training_documents_is_an_error(store: Store, pool: Corpus, tmp_path: Path) -> None:
    tests = corpus_of(store, tmp_path, "tests", {"test": SAMPLE["test"]})
    with pytest.raises(CorpusError, match="tests: the corpus has no training documents to select from or towards"):
        select(store, "chosen", pool, tests, DSIR)


def test_the_command_writes_what_was_chosen(tmp_path: Path) -> None:
    for name, splits in (("pool", {"train": POOL}), ("sample", SAMPLE)):
        (tmp_path / name).mkdir()
        for split, own in splits.items():
            rows = "".join(json.dumps({"text": text}) + "\n" for text in own)
            (tmp_path / name / f"{split}.jsonl").write_text(rows)
    out, home = tmp_path / "out" / "chosen.jsonl", ("--home", str(tmp_path / "home"))
    asked = ("select", str(tmp_path / "pool"), "--towards", str(tmp_path / "sample"), "--out", str(out), *home)
    done = crosscal(*asked, "--method", "zip-fit", "--documents", "9", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["chosen"] == 9
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert all(row["digest"] == hashlib.sha256(row["text"].encode()).hexdigest() for row in rows)
    assert len({row["text"] for row in rows} & set(PLANTED)) >= 7  # some planted documents are in the pool's test split
    for wrong in (["--method", "dsir"], ["--documents", "3"], ["--method", "other", "--documents", "3"]):
        assert crosscal(*asked, *wrong).code == 2
    assert crosscal("select", str(tmp_path / "pool"), "--out", str(tmp_path / "chosen.txt"), *home).code == 2


def test_conversations_are_chosen_by_what_they_say_and_stay_conversations(
    store: Store, sample: Corpus, tmp_path: Path
) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": text}]}
        for number, text in enumerate(PLANTED)
    ]
    (tmp_path / "chats").mkdir()
    rows = [*chats, *({"text": text} for text in made_up("law", "pool", 40))]
    (tmp_path / "chats" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = ingest(store, "chats", [str(tmp_path / "chats")], split="train").corpus
    found = select(store, "chosen", pool, sample, DSIR)
    (shard,) = found.corpus.shards
    assert shard.conversations["train"] >= 11
    write_chosen(store, found, tmp_path / "chosen.jsonl")
    again = ingest(store, "again", [str(tmp_path / "chosen.jsonl")], split="train").corpus
    assert set(digests(store, again.shards[0])) == {digest for digest, _ in ranked(store, found)}
    assert again.shards[0].conversations == {"train": shard.conversations["train"]}
    assert again.shards[0].characters["train"] == shard.characters["train"]
