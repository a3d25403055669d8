"""Permissions of files that are written atomically."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from crosscal.files import write_whole
from crosscal.models.tensor_files import save_tensors


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_written_files_are_readable_by_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
        write_whole(tmp_path / "text.json", "{}")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "text.json"), 0o666 & ~umask)
