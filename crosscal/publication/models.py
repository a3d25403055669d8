"""Models as artifacts of kind `models`: the files of a loadable folder and its adapter; the key is their digest."""

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
PUBLISHED = ("*", "adapter/*")


def publish_model(store: Store, folder: Path, provenance: Mapping[str, Any]) -> str:
    """Store a copy of a model folder and return its key. Raises `ModelError` if it is none or changes."""
    found = (file for pattern in PUBLISHED for file in folder.glob(pattern) if file.is_file())
    names = sorted(file.relative_to(folder).as_posix() for file in found if not file.name.endswith(UNFINISHED))
    if "config.json" not in names:
        raise ModelError("this is not a model directory", where=str(folder), got="no config.json")
    key = _key(folder, names)
    if store.find(MODELS, key) is None:
        with store.publish(MODELS, key, provenance) as staged:
            for name in names:
                _copy(folder / name, staged / name)
            if _key(staged, names) != key:
                raise ModelError("the model changed while it was published", where=str(folder), do="Publish it again.")
    return key


def _key(folder: Path, names: Sequence[str]) -> str:
    return digest_of([[name, digest_file(folder / name)] for name in names])


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    copy_file(file, to)


def model_folder(store: Store, key: str, aside: Path) -> Path:
    """Return a folder that `AutoModelForCausalLM.from_pretrained` loads, every digest checked.

    A local store contains one. For a remote store it is assembled in `aside`, from the local cache.
    """
    artifact = store.get(MODELS, key)
    paths = {name: store.path(artifact, name) for name in artifact.files}
    if (own := local_folder(store, key)) is not None:
        return own
    for name, path in paths.items():
        if not (aside / name).exists():
            _copy(path, aside / name)
    return aside


def check_model(store: Store, key: str) -> None:
    """Read every file of a model. Raises `StoreError` if the model or a file is missing or damaged."""
    artifact = store.get(MODELS, key)
    for name in artifact.files:
        store.path(artifact, name)


def local_folder(store: Store, key: str) -> Path | None:
    """Return the folder of a model on this machine; None for a remote store. Its files are not checked or fetched."""
    store.get(MODELS, key)
    return store.home.root / "objects" / MODELS / key if isinstance(store.home, LocalHome) else None


def copy_model(store: Store, key: str, to: Path) -> Path:
    """Copy a model out of the store. Raises `UsageError` if `to` exists and is not an empty folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError("the folder is not empty", where=str(to), do="Name a new one.")
    artifact = store.get(MODELS, key)
    to.mkdir(parents=True, exist_ok=True)
    for name in sorted(artifact.files, key=lambda name: name == "config.json"):  # last: no model without it
        _copy(store.path(artifact, name), to / name)
    return to
