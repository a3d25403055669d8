"""A calibration set: the exact token windows of a calibration pass, stored unchanged."""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from crosscal.corpora.corpus import TEMPLATE
from crosscal.errors import UsageError
from crosscal.store import Store, digest_of
from crosscal.store.arrays import array_of, arrow_file

KIND = "calibration"
WINDOWS = "windows.arrow"


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token windows of one source, and the provenance that identifies them."""

    tokens_SL: torch.Tensor
    """int64."""

    provenance: dict[str, Any]
    """Everything that determines the tokens, and nothing else."""

    notes: tuple[str, ...]
    """Differences from the request, as sentences for a report."""

    @property
    def key(self) -> str:
        """The key of these windows in the store."""
        return digest_of(self.provenance)


@dataclass(frozen=True)
class WindowRequest:
    """Number, length, seed, split ("train", "validation" or "test") and format of the windows to build."""

    windows: int = 128
    length: int = 2048
    """Tokens in a window."""

    seed: int = 0
    split: str = "train"
    begin_token: bool | None = None
    """Start every window with beginning-of-text or not; None: if the tokenizer adds it to texts by default."""

    plain_text: bool = False
    """Tokenize text that spells a special token as ordinary text."""

    chat: str = TEMPLATE
    """How conversations are read (see `crosscal.corpora.Corpus`); without effect on corpora without conversations."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"must be at least {least}", where=f"calibration.{name}", got=str(getattr(self, name)))

    def provenance(self, begin: int | None) -> dict[str, Any]:
        """Return the entries of a provenance that describe the request; `begin` is the first token of its windows.

        Settings without effect are left out, so that equal windows stored by earlier versions are found.
        """
        said = {"split": self.split, "windows": self.windows, "length": self.length, "seed": self.seed}
        return said | ({} if begin is None else {"begin": begin}) | ({"plain_text": True} if self.plain_text else {})

    def within(self, max_length: int | None) -> tuple[WindowRequest, tuple[str, ...]]:
        """Return the request with `length` limited to the model's `max_length`, and a note if that changed it."""
        if max_length is None or self.length <= max_length:
            return self, ()
        note = f"Windows have {max_length} tokens instead of {self.length}: the model takes no more."
        return replace(self, length=max_length), (note,)


def stored_windows(store: Store, provenance: dict[str, Any], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the windows of this provenance from the store; build and store them first if they are missing."""
    key = digest_of(provenance)
    artifact = store.find(KIND, key)
    if artifact is None:
        tokens_SL = make()
        with store.publish(KIND, key, provenance) as folder:
            _write_windows(folder / WINDOWS, tokens_SL)
    return windows_by_key(store, key)


def windows_by_key(store: Store, key: str) -> torch.Tensor:
    """Return the windows of a calibration set, int64 [S, L]. Raises `MissingArtifact`."""
    return _read_windows(store.path(store.get(KIND, key), WINDOWS))


def _write_windows(path: Path, tokens_SL: torch.Tensor) -> None:
    values = array_of(tokens_SL.numpy().astype(np.int32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, tokens_SL.shape[1])
    table = pa.table({"tokens": column})
    with arrow_file(path, table.schema, pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def _read_windows(path: Path) -> torch.Tensor:
    with pa.memory_map(str(path)) as source:
        column = pa.ipc.open_file(source).read_all().column("tokens").combine_chunks()
        tokens = column.flatten().to_numpy().astype(np.int64)
    return torch.from_numpy(tokens).reshape(-1, column.type.list_size)
