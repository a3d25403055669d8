"""Where a pass over the model keeps hidden states between blocks: in memory, or on disk if they would fill it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from crosscal.errors import ModelError
from crosscal.models.source import ModelSource
from crosscal.stages.memory import free_bytes

SHARE = 0.5  # of the free memory that hidden states may take; weights and moments need the rest
GIB = 2**30

_log = logging.getLogger(__name__)


def spill_folder(
    source: ModelSource,
    windows: Iterable[Tensor],
    *,
    dtype: torch.dtype,
    device: str,
    free: int | None = None,
    folder: Path | None = None,
    streams: int = 1,
) -> Path | None:
    """Return None if the hidden states of all `windows` take at most half of the device's free memory, else a folder.
    `streams`: the number of copies that a walk holds.

    By default it is the system's folder for temporary files, set by `TMPDIR`; a walk removes its files there. Raises
    `ModelError` if they do not fit there either: a mapped file that outgrows its disk would end the process.
    """
    tokens, hidden = sum(tokens_SL.numel() for tokens_SL in windows), source.config.get_text_config().hidden_size
    needed_bytes = streams * tokens * hidden * dtype.itemsize
    free = free_bytes(device) if free is None else free
    if needed_bytes <= SHARE * free:
        return None
    folder = folder or Path(tempfile.gettempdir())
    what = f"{needed_bytes / GIB:.1f} GiB of hidden states, {free / GIB:.1f} GiB of memory free"
    if needed_bytes > shutil.disk_usage(folder).free:
        raise ModelError(
            "the hidden states of the windows fit neither in memory nor on disk",
            where=str(folder),
            got=what,
            do="Set TMPDIR to a folder on a larger disk, or read fewer windows.",
        )
    _log.info("%s: they stay in %s between blocks", what, folder)
    return folder
