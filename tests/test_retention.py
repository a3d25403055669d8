"""What is removed after its time, what never is, whatever its age, and what takes up disk space."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from crosscal.corpora import ingest
from crosscal.publication import Published
from crosscal.publication.retention import drop_models, remove_old_runs
from crosscal.store import Store, digest_of
from crosscal.usage import usage
from tests.helpers.tiny_place import crosscal, make_place, write_documents

OLD = time.time() - 100 * 86400


def run_folder(runs: Path, name: str, *, age: float = OLD) -> Path:
    folder = runs / name
    (folder / "models" / "x").mkdir(parents=True)
    (folder / "identity.json").write_text('{"identity": "x"}')
    (folder / "plan.yaml").write_text("model: x")
    (folder / "models" / "x" / "weights").write_bytes(b"x" * 1000)
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (age, age))
    return folder


def publish(store: Store, domain: str, model: str, run: Path) -> str:
    """Move a domain's pointer to the model of this name; return the model's key."""
    key = digest_of(model)
    if store.find("models", key) is None:
        with store.publish("models", key, {}) as staged:
            (staged / "config.json").write_text(model)
    published = Published(store)
    facts: dict[str, Any] = {"model": key, "variant": model, "corpus_version": 1, "run_dir": str(run), "at": "now"}
    published.move(domain, published.current(domain), facts)
    return key


def test_old_run_directories_go_and_those_of_published_models_stay(store: Store, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    gone, first, now = (run_folder(runs, name) for name in ("gone", "first", "now"))
    young = run_folder(runs, "young", age=time.time())
    at_work = run_folder(runs, "at-work")
    (at_work / "models" / "x" / "weights").touch()
    publish(store, "legal", "first", first)
    publish(store, "legal", "now", now)
    assert [path for path, _ in remove_old_runs(store, runs, 30, None)] == [str(gone)]
    assert sorted(runs.iterdir()) == sorted([first, now, young, at_work])
    assert [path for path, _ in remove_old_runs(store, runs, 30, 1)] == [str(first)]
    assert sorted(runs.iterdir()) == sorted([now, young, at_work])


def test_what_is_no_run_directory_is_never_touched(store: Store, tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", run_folder(tmp_path, "elsewhere")
    kept = [run_folder(runs, name) for name in ("no-plan", "no-identity", "other-identity", "no-json")]
    (kept[0] / "plan.yaml").unlink()
    (kept[1] / "identity.json").unlink()
    (kept[2] / "identity.json").write_text("[]")
    (kept[3] / "identity.json").write_text("{")
    (runs / "file").write_text("x")
    (runs / "link").symlink_to(elsewhere)
    for path in runs.rglob("*"):
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    before = sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts)
    assert list(remove_old_runs(store, runs, 30, None)) == []
    assert list(remove_old_runs(store, tmp_path / "nowhere", 30, None)) == []
    assert sorted(path for path in tmp_path.rglob("*") if "home" not in path.parts) == before


def test_a_link_in_a_run_directory_leads_nowhere(store: Store, tmp_path: Path) -> None:
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    folder = run_folder(runs, "old")
    (folder / "link").symlink_to(outside)
    os.utime(folder / "link", (OLD, OLD), follow_symlinks=False)
    assert len(list(remove_old_runs(store, runs, 30, None))) == 1
    assert (outside / "precious").read_text() == "x"


def test_models_of_older_moves_go_unless_a_kept_move_names_them(store: Store, tmp_path: Path) -> None:
    a, b, c = (publish(store, "legal", name, tmp_path) for name in ("a", "b", "c"))
    publish(store, "legal", "a", tmp_path)  # moved back to it
    publish(store, "medical", "b", tmp_path)
    with store.publish("models", digest_of("unpublished"), {}) as staged:
        (staged / "config.json").write_text("x")
    assert list(drop_models(store, 3)) == [], "b is another domain's"
    publish(store, "medical", "d", tmp_path)
    assert [place for place, _ in drop_models(store, 1)] == [f"objects/models/{key}" for key in (b, c)]
    assert {key for _, key in store.keys("models")} == {a, digest_of("d"), digest_of("unpublished")}
    assert list(drop_models(store, 1)) == []
    assert len(Published(store).history("legal")) == 4, "the history stays whole"


def test_room_is_told_by_kind_corpus_run_and_what_can_go(store: Store, tmp_path: Path) -> None:
    write_documents(tmp_path / "one.jsonl", seed="one", count=40)
    write_documents(tmp_path / "two.jsonl", seed="two", count=20)
    shards = [
        ingest(store, "legal", [str(tmp_path / f"{name}.jsonl")]).corpus.shards[-1].key for name in ("one", "two")
    ]
    windows, parts = digest_of("windows"), {"windows": 3000, "moments": 5000}
    for kind, key, provenance in (
        ("calibration", windows, {"shard": shards[1]}),
        ("moments", digest_of("m"), {"calibration": windows}),
        ("blocks", digest_of("b"), {"model": "x"}),
    ):
        with store.publish(kind, key, provenance) as staged:
            (staged / "file").write_bytes(b"x" * parts.get({"calibration": "windows"}.get(kind, kind), 7000))
    run = run_folder(tmp_path / "runs", "model-1")
    publish(store, "legal", "now", run)
    (tmp_path / "home" / "staging" / "left").mkdir(parents=True)
    (tmp_path / "home" / "staging" / "left" / "file").write_bytes(b"x" * 100)
    for path in (tmp_path / "home" / "staging" / "left", tmp_path / "home" / "staging" / "left" / "file"):
        os.utime(path, (OLD, OLD))
    manifest = tmp_path / "home" / "objects" / "blocks" / digest_of("b") / "manifest.json"
    os.utime(manifest, (OLD, OLD))
    found = usage(store, tmp_path / "runs", unused_days=30)
    by_kind = {row["kind"]: row["bytes"] for row in found["kinds"]}
    assert (by_kind["moments"], by_kind["blocks"], by_kind["calibration"]) == (5000, 7000, 3000)
    assert found["bytes"] == sum(by_kind.values())
    first, second = found["corpora"]
    assert [(row["corpus"], row["version"], row["made_bytes"]) for row in (first, second)] == [
        ("legal", 1, 0),
        ("legal", 2, 8000),
    ]
    assert first["bytes"] + second["bytes"] == by_kind["corpora"]
    (row,) = found["runs"]
    assert (row["run"], row["published"]) == (str(run), ["legal"])
    assert row["bytes"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    freed = {row["reason"]: row["bytes"] for row in found["gc"]}
    assert freed["unused for 30 days"] == 7000
    assert freed["abandoned"] >= 100
    done = crosscal("store", "du", "--home", str(tmp_path / "home"), "--runs", str(tmp_path / "runs"), "--json")
    assert json.loads(done.out)["kinds"] == found["kinds"]


@pytest.mark.slow
def test_nearly_all_that_a_run_keeps_is_a_corpus_s(tmp_path: Path) -> None:
    """In a real run, only solved variants, measurements and facts about the model belong to no corpus."""
    place = make_place(tmp_path)
    place.run()
    found = usage(Store(place.home), tmp_path)
    kinds = {row["kind"]: row["bytes"] for row in found["kinds"]}
    of_corpora = sum(row["bytes"] + row["made_bytes"] for row in found["corpora"])
    assert of_corpora == sum(kinds[kind] for kind in ("corpora", "calibration", "draws", "moments", "likelihoods"))
    assert [row["run"] for row in found["runs"]] == [str(place.run_dir)]
