"""A calibration set: the exact windows of tokens that a model reads, kept as they are."""

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
    tokens_SL: torch.Tensor
    """int64."""

    provenance: dict[str, Any]
    """All that determines the tokens, and nothing else."""

    notes: tuple[str, ...]
    """What differs from the request, in sentences for a report."""

    @property
    def key(self) -> str:
        """What the store calls these windows."""
        return digest_of(self.provenance)


@dataclass(frozen=True)
class WindowRequest:
    windows: int = 128
    length: int = 2048
    """Tokens in a window."""

    seed: int = 0
    split: str = "train"
    begin_token: bool | None = None
    """Whether every window begins with beginning-of-text; None: where the tokenizer puts it in front of a text."""

    plain_text: bool = False
    """Read text that spells a special token as text."""

    chat: str = TEMPLATE
    """How conversations are read (see `crosscal.corpora.Corpus`); of what holds none it changes nothing."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"must be at least {least}", where=f"calibration.{name}", got=str(getattr(self, name)))

    def provenance(self, begin: int | None) -> dict[str, Any]:
        """What the request adds to a provenance, `begin` being the token that its windows begin with.

        Settings that change nothing are left out, so that windows of earlier versions are found where they are the
        same.
        """
        said = {"split": self.split, "windows": self.windows, "length": self.length, "seed": self.seed}
        return said | ({} if begin is None else {"begin": begin}) | ({"plain_text": True} if self.plain_text else {})

    def within(self, max_length: int | None) -> tuple[WindowRequest, tuple[str, ...]]:
        """The request with windows no longer than the model's `max_length`, and the note that says so."""
        if max_length is None or self.length <= max_length:
            return self, ()
        note = f"Windows have {max_length} tokens instead of {self.length}: the model takes no more."
        return replace(self, length=max_length), (note,)


def stored_windows(store: Store, provenance: dict[str, Any], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The windows of this provenance from the store, made and stored where they are not there yet."""
    key = digest_of(provenance)
    artifact = store.find(KIND, key)
    if artifact is None:
        tokens_SL = make()
        with store.publish(KIND, key, provenance) as folder:
            _write_windows(folder / WINDOWS, tokens_SL)
    return windows_by_key(store, key)


def windows_by_key(store: Store, key: str) -> torch.Tensor:
    """The windows of a calibration set, [S, L]. Raises `MissingArtifact`."""
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
