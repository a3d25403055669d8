"""The published model of a domain: a pointer with its full history, models that are kept and loadable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crosscal.errors import ModelError, StoreConflict, UsageError
from crosscal.publication import Published, model_folder, models, publish_model
from crosscal.publication.models import copy_model
from crosscal.store import Store
from tests.helpers.tiny_text import tiny_llama


def facts(model: str) -> dict[str, object]:
    return {"model": model, "corpus_version": 1}


def test_the_pointer_goes_back_and_forth_and_forgets_nothing(store: Store) -> None:
    published = Published(store)
    with pytest.raises(UsageError, match="nothing is published"):
        published.roll_back("legal", "now")
    for model in "abc":
        published.move("legal", published.current("legal"), facts(model))
    assert published.roll_back("legal", "now").model == "b"
    assert published.roll_back("legal", "now").model == "a"
    with pytest.raises(UsageError, match="before this one"):
        published.roll_back("legal", "now")
    published.move("legal", published.current("legal"), facts("d"))
    assert published.roll_back("legal", "now").model == "a"
    assert [move.model for move in published.history("legal")] == list("abcbada")
    assert published.domains() == ["legal"]


def test_concurrent_pointer_move_raises_conflict(store: Store) -> None:
    published = Published(store)
    published.move("legal", None, facts("a"))
    seen = published.current("legal")
    published.move("legal", seen, facts("b"))
    with pytest.raises(StoreConflict):
        published.move("legal", seen, facts("c"))


def test_a_published_model_loads_and_is_a_copy(store: Store, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "run")
    (tmp_path / "run" / "x.safetensors.7.partial").write_bytes(b"half")
    key = publish_model(store, tmp_path / "run", {"domain": "legal"})
    assert publish_model(store, tmp_path / "run", {"domain": "other"}) == key
    folder = model_folder(store, key, tmp_path / "aside")
    assert not (folder / "model.safetensors").samefile(tmp_path / "run" / "model.safetensors")
    assert not (tmp_path / "aside").exists()
    copy = copy_model(store, key, tmp_path / "copy")
    for place in (folder, copy):
        loaded = AutoModelForCausalLM.from_pretrained(place)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(UsageError, match="not empty"):
        copy_model(store, key, tmp_path / "copy")


def test_from_a_remote_store_a_folder_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
    tiny_llama(tmp_path / "run")
    store = Store(f"memory://{tmp_path.name}-models")
    folder = model_folder(store, publish_model(store, tmp_path / "run", {}), tmp_path / "aside")
    assert folder == tmp_path / "aside"
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("home", ["folder", "memory"])
def test_writing_into_any_copy_of_a_published_model_leaves_it_whole(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwrite in place every byte of the run's folder, of one made for loading, and of one fetched for the user."""
    monkeypatch.setenv("CROSSCAL_CACHE", str(tmp_path / "cache"))
    location = str(tmp_path / "home") if home == "folder" else f"memory://{tmp_path.name}-copies"
    store = Store(location)
    tiny_llama(tmp_path / "run")
    key = publish_model(store, tmp_path / "run", {})
    given = model_folder(store, key, tmp_path / "aside")
    copies = [tmp_path / "run", copy_model(store, key, tmp_path / "fetched"), *([given] if home == "memory" else [])]
    names = [file.name for file in (tmp_path / "run").iterdir()]
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    for folder in copies:
        for name in names:
            with (folder / name).open("r+b") as file:
                file.write(b"!" * len(whole[name]))
    fresh = Store(location)
    assert [problem for *_, problem in fresh.verify()] == [None]
    assert {name: fresh.read_bytes(fresh.get("models", key), name) for name in names} == whole
    kept = [file for place in ("home", "cache") for file in (tmp_path / place).rglob("*") if file.is_file()]
    assert {file.stat().st_nlink for file in kept} == {1}, "no file of the store has a second name"


def test_a_model_that_changes_while_it_is_published_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "run")
    copy_file = models.copy_file

    def overtaken(source: Path, target: Path) -> None:
        copy_file(source, target)
        target.write_bytes(target.read_bytes() + b" ")

    monkeypatch.setattr(models, "copy_file", overtaken)
    with pytest.raises(ModelError, match="changed while"):
        publish_model(store, tmp_path / "run", {})
    assert list(store.list()) == []


def test_a_folder_without_a_model_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model directory"):
        publish_model(store, tmp_path, {})


@pytest.mark.parametrize("is_published", [True, False])
def test_the_sweep_keeps_every_model_that_was_published(store: Store, tmp_path: Path, is_published: bool) -> None:
    tiny_llama(tmp_path / "run")
    key = publish_model(store, tmp_path / "run", {})
    if is_published:
        Published(store).move("legal", None, facts(key))
        Published(store).move("legal", Published(store).current("legal"), facts("0" * 64))
    removed = [place for place, _ in store.sweep(unused_days=0)]
    assert removed == ([] if is_published else [f"objects/models/{key}"])
