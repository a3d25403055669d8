"""A calibration set: the exact windows of tokens that a model reads, kept as they are."""

from __future__ import annotations

# Shapes: S windows, L tokens in a window.
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from crosscal.errors import UsageError
from crosscal.store import Store, digest_of

KIND = "calibration"


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    key: str
    tokens_SL: torch.Tensor
    """int64."""

    provenance: dict[str, Any]
    """All that determines the tokens."""

    notes: tuple[str, ...]
    """What differs from the request, in sentences for a report."""


@dataclass(frozen=True)
class WindowRequest:
    windows: int = 128
    length: int = 2048
    """Tokens in a window."""

    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"must be at least {least}", where=f"calibration.{name}", got=str(getattr(self, name)))

    def within(self, max_length: int | None) -> tuple[WindowRequest, tuple[str, ...]]:
        """The request with windows no longer than the model's `max_length`, and the note that says so."""
        if max_length is None or self.length <= max_length:
            return self, ()
        note = f"Windows have {max_length} tokens instead of {self.length}: the model takes no more."
        return replace(self, length=max_length), (note,)


def keep(store: Store, provenance: dict[str, Any], tokens_SL: torch.Tensor, notes: Sequence[str]) -> CalibrationSet:
    """Store windows under the digest of what determined them."""
    key = digest_of(provenance)
    with store.publish(KIND, key, {**provenance, "notes": list(notes)}) as folder:
        _write_windows(folder / "windows.arrow", tokens_SL)
    return CalibrationSet(key, tokens_SL, provenance, tuple(notes))


def kept(store: Store, provenance: dict[str, Any]) -> CalibrationSet | None:
    """The windows made from exactly this before, or None."""
    artifact = store.find(KIND, digest_of(provenance))
    if artifact is None:
        return None
    return load_set(store, artifact.key)


def load_set(store: Store, key: str) -> CalibrationSet:
    """The set of this key. Raises `MissingArtifact`."""
    artifact = store.get(KIND, key)
    provenance = {name: value for name, value in artifact.provenance.items() if name != "notes"}
    tokens_SL = _read_windows(store.path(artifact, "windows.arrow"))
    return CalibrationSet(key, tokens_SL, provenance, tuple(artifact.provenance["notes"]))


def _write_windows(path: Path, tokens_SL: torch.Tensor) -> None:
    values = pa.array(tokens_SL.numpy().astype(np.int32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, tokens_SL.shape[1])
    table = pa.table({"tokens": column})
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def _read_windows(path: Path) -> torch.Tensor:
    with pa.memory_map(str(path)) as source:
        column = pa.ipc.open_file(source).read_all().column("tokens").combine_chunks()
        tokens = column.flatten().to_numpy().astype(np.int64)
    return torch.from_numpy(tokens).reshape(-1, column.type.list_size)
