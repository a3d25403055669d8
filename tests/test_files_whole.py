"""Files that appear whole: who may read them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys, torch
from pathlib import Path
from crosscal.models.tensor_files import save_tensors
from crosscal.files import write_whole
folder = Path(sys.argv[1])
save_tensors({"weight": torch.ones(2)}, folder / "model.safetensors")
write_whole(folder / "text.json", "{}")
"""


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_written_files_are_readable_by_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], check=True, umask=umask, env=dict(os.environ))
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "text.json"), 0o666 & ~umask)
