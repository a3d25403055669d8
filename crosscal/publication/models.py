"""Models as artifacts of the store, kind `models`: the files of a loadable folder, named by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscal.errors import ModelError, UsageError
from crosscal.store import Store, digest_file, digest_of
from crosscal.store.copies import copy_file
from crosscal.store.local_home import LocalHome

MODELS = "models"
UNFINISHED = ".partial"


def publish_model(store: Store, folder: Path, provenance: Mapping[str, Any]) -> str:
    """Keep a copy of a model folder as it is; returns its key. Raises `ModelError` when it changes meanwhile."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.endswith(UNFINISHED))
    if not any(file.name == "config.json" for file in files):
        raise ModelError("this is not a model directory", where=str(folder), got="no config.json")
    key = _key(files)
    if store.find(MODELS, key) is None:
        with store.publish(MODELS, key, provenance) as staged:
            copies = [staged / file.name for file in files]
            for file, copy in zip(files, copies, strict=True):
                copy_file(file, copy)
            if _key(copies) != key:
                raise ModelError("the model changed while it was published", where=str(folder), do="Publish it again.")
    return key


def _key(files: Sequence[Path]) -> str:
    return digest_of([[file.name, digest_file(file)] for file in files])


def model_folder(store: Store, key: str, aside: Path) -> Path:
    """A folder that `AutoModelForCausalLM.from_pretrained` loads, every digest checked.

    A local store has one; of a remote one it is put together in `aside`, from the local cache.
    """
    artifact = store.get(MODELS, key)
    paths = {name: store.path(artifact, name) for name in artifact.files}
    if all(path.name == name for name, path in paths.items()):
        return paths["config.json"].parent
    aside.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        if not (aside / name).exists():
            copy_file(path, aside / name)
    return aside


def local_folder(store: Store, key: str) -> Path | None:
    """Where a model lies on this machine; None for a remote store. Nothing is checked or fetched."""
    store.get(MODELS, key)
    return store.home.root / "objects" / MODELS / key if isinstance(store.home, LocalHome) else None


def copy_model(store: Store, key: str, to: Path) -> Path:
    """Fetch a model out of the store. Raises `UsageError` when the folder is there and not empty."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError("the folder is not empty", where=str(to), do="Name a new one.")
    artifact = store.get(MODELS, key)
    to.mkdir(parents=True, exist_ok=True)
    for name in sorted(artifact.files, key=lambda name: name == "config.json"):  # last: without it, it is no model
        copy_file(store.path(artifact, name), to / name)
    return to
