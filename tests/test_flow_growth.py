"""Small landings improve the model however they are split into files, and start no run before a window is full."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from crosscal.corpora import documents, ingest, load_corpus
from crosscal.errors import TooLittleText
from crosscal.flows.pipeline import carry_out
from crosscal.flows.recompress import recompress
from crosscal.landing import Ledger, take_in
from crosscal.landing.status import overview
from crosscal.models import ModelSource
from crosscal.plan import parse_plan
from crosscal.publication import Published
from crosscal.stages.moments import DENSE, CachedMoments
from crosscal.statistics import VECTORS
from crosscal.store import Store
from tests.helpers.tiny_place import Place, make_place, write_documents
from tests.helpers.tiny_text import SENTENCES

pytestmark = pytest.mark.slow

LEGAL = "legal"
SHORT = "When it rains we stay at home."
DEMO = Path(__file__).parents[1] / "data" / "demo"
DOCUMENTS, LENGTH = 150, 256
FILES = {"together": 150, "few": 6, "single": 1}
"""Corpus → documents per file."""


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip `fsync`: these tests do not check what survives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def land(store: Store, folder: Path, name: str, lines: Sequence[bytes], size: int) -> None:
    """Write `lines` to the landing place in files of `size` documents, then ingest them."""
    (folder / name).mkdir(parents=True)
    for start in range(0, len(lines), size):
        (folder / name / f"{start:03d}.jsonl").write_bytes(b"\n".join(lines[start : start + size]) + b"\n")
    take_in(store, str(folder), settle_seconds=0)


def test_short_documents_make_a_better_model_however_they_land(tmp_path: Path) -> None:
    """150 files of one document, 25 of six, or one of all; no single document fills a window."""
    store = Store(tmp_path / "home")
    packed = (DEMO / "corpora" / "biomedical" / "train.jsonl.zst").read_bytes()
    lines = zstandard.decompress(packed, max_output_size=1 << 28).splitlines()[:DOCUMENTS]
    for name, size in FILES.items():
        land(store, tmp_path / "landing", name, lines, size)
        assert Ledger(store).pending(name) == len(range(0, DOCUMENTS, size))
    plan = {
        "model": str(DEMO / "model"),
        "corpora": {"general": str(DEMO / "corpora" / "general"), **{name: {} for name in FILES}},
        "calibration": {"windows": 128, "length": LENGTH, "held_out_windows": 8},
        "compress": [{"method": "sparsegpt", "sparsity": 0.7, "domain": [*FILES], "alpha": [0, 0.5]}],
        "evaluate": {"perplexity": [*FILES], "windows": 16},
        "execution": {"device": "cpu", "keep_models": False},
    }
    record = carry_out(parse_plan(plan), store.location, str(tmp_path / "run"))
    sets = json.loads((tmp_path / "run" / "identity.json").read_text())["sets"]
    drawn = {sample["corpus"]: sum_of(sample["calibration"]) for sample in sets}
    shares = {name: drawn[name] / train_tokens(store, name) for name in FILES}
    assert min(shares.values()) > 0.98, "all but a rest shorter than a window"
    assert max(shares.values()) - min(shares.values()) < LENGTH / min(drawn[name] for name in FILES)
    values = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    perplexity = {(row["variant"], row["corpus_or_task"]): row["value"] for row in values}
    for name in FILES:
        assert perplexity[f"sparsegpt-70-{name}-a0.5", name] < 0.9 * perplexity["sparsegpt-70-general", name]
    assert record["calibration_tokens_read"] == record["calibration_tokens"]


def sum_of(sums: dict[str, Any]) -> int:
    return sum(part["tokens"] for part in (*sums["apart"], *filter(None, [sums["folded"]])))


def train_tokens(store: Store, name: str) -> int:
    tokenizer = ModelSource.open(DEMO / "model").tokenizer()
    texts = [text for shard in load_corpus(store, name).shards for text in documents(store, shard, "train")]
    return sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])


# --- landings that change nothing ------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    place.write_plan(
        corpora={"general": "general", "$domain": {}},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "$domain"}],
        publish={"domain": "$domain", "tolerance": 1.0},
    )
    return place


def go(place: Place) -> dict[str, Any]:
    return recompress.fn(str(place.plan), [], str(place.home), str(place.folder / "runs"), LEGAL)


def add(place: Place, name: str, *texts: str) -> None:
    """Write the texts to a file in the landing place, then ingest it."""
    file = place.folder / "landing" / LEGAL / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    take_in(Store(place.home), str(place.folder / "landing"), settle_seconds=0)


def moments_in(place: Place) -> list[tuple[str, str]]:
    return sorted(Store(place.home).keys("moments"))


def test_a_landing_counts_once_it_fills_a_window_and_starts_no_run_before(place: Place) -> None:
    ledger = Ledger(Store(place.home))
    add(place, "a.jsonl", *(f"{SHORT} {letter}" for letter in "abcd"))
    waiting = go(place)
    assert [run["outcome"] for run in waiting["runs"]] == ["unchanged"]
    assert "legal v1: nothing new: the train split does not fill one window of 32 tokens" in waiting["message"]
    assert ledger.pending(LEGAL) is None
    assert not moments_in(place), "nothing was read"

    for split in ("train", "validation", "test"):
        (place.folder / "legal" / f"{split}.jsonl").rename(place.folder / "landing" / LEGAL / f"{split}.jsonl")
    take_in(Store(place.home), str(place.folder / "landing"), settle_seconds=0)
    first = go(place)
    assert [run["outcome"] for run in first["runs"]] == ["published"]

    before, runs = moments_in(place), sorted((place.folder / "runs").iterdir())
    add(place, "short.jsonl", SHORT)
    nothing = go(place)
    assert [run["outcome"] for run in nothing["runs"]] == ["unchanged"]
    assert "no new training window since v4" in nothing["message"]
    assert (moments_in(place), sorted((place.folder / "runs").iterdir())) == (before, runs)
    assert ledger.pending(LEGAL) is None
    assert [row["state"] for row in overview(ledger)] == ["unchanged"]
    assert [move.corpus_version for move in Published(Store(place.home)).history(LEGAL)] == [4]
    assert {entry.state for entry in ledger.entries(LEGAL)} == {"unchanged", "published"}

    add(place, "again.jsonl", SHORT)
    assert go(place)["runs"] == [], "what had landed before asks for nothing"
    add(place, "empty.jsonl")
    assert go(place)["runs"] == [], "nor does what is refused"

    add(place, "long.jsonl", *(f"{number} {' '.join(SENTENCES)}" for number in range(2)))
    enough = go(place)["runs"][0]
    assert enough["outcome"] in ("published", "kept")
    assert 0 < enough["record"]["calibration_tokens_read"] < 16 * 32


def test_another_plan_on_the_same_windows_is_a_run(place: Place) -> None:
    write_documents(place.folder / "more.jsonl", seed="more", count=80)
    ingest(Store(place.home), LEGAL, [str(place.folder / "more.jsonl")])
    ledger = Ledger(Store(place.home))
    ledger.request(LEGAL, 1)
    assert go(place)["runs"][0]["outcome"] == "published"
    add(place, "short.jsonl", SHORT)
    record = recompress.fn(
        str(place.plan), ["compress.0.sparsity=0.6"], str(place.home), str(place.folder / "other"), LEGAL
    )
    assert record["runs"][0]["outcome"] in ("published", "kept")


def test_too_little_text_of_another_corpus_is_a_failure(place: Place) -> None:
    place.write_plan(
        corpora={"general": "tiny.txt", "$domain": {}},
        compress=[{"method": "wanda", "sparsity": 0.5, "domain": "$domain"}],
    )
    (place.folder / "tiny.txt").write_text(f"{SHORT}\n")
    write_documents(place.folder / "more.jsonl", seed="more", count=80)
    ingest(Store(place.home), LEGAL, [str(place.folder / "more.jsonl")])
    ledger = Ledger(Store(place.home))
    ledger.request(LEGAL, 1)
    with pytest.raises(TooLittleText, match="general: the train split does not fill one window"):
        go(place)
    assert [run.state for run in ledger.runs(LEGAL)] == ["failed"]


def test_a_run_of_many_landings_reads_few_sets(place: Place) -> None:
    """After seven more landings with a run each, a solve reads the four sets that are kept apart and one folded sum."""
    write_documents(place.folder / "more.jsonl", seed="more", count=80)
    ingest(Store(place.home), LEGAL, [str(place.folder / "more.jsonl")])
    ledger = Ledger(Store(place.home))
    ledger.request(LEGAL, 1)
    go(place)
    for number in range(7):
        file = place.folder / f"{number}.jsonl"
        write_documents(file, seed=str(number), count=6)
        ledger.request(LEGAL, ingest(Store(place.home), LEGAL, [str(file)]).corpus.version)
        run = go(place)["runs"][0]
    sets = json.loads((Path(run["run_dir"]) / "identity.json").read_text())["sets"]
    sample = next(sample for sample in sets if sample["corpus"] == LEGAL)
    assert len(sample["calibration"]["apart"]) == 4
    assert sample["calibration"]["folded"] is not None
    cached = CachedMoments(Store(place.home), run["record"]["model"], DENSE, "float32", wanted=frozenset(VECTORS))
    assert all(cached.has(part["key"], 1) for part in sample["calibration"]["apart"])
