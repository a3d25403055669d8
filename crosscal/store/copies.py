"""Copies of files, never hard links: writing to one copy cannot damage the other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHUNK_BYTES = 2**30


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes. Where the file system supports it (Btrfs, XFS), both share blocks until one is written."""
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while os.copy_file_range(reader.fileno(), writer.fileno(), CHUNK_BYTES):
                pass
        is_whole = target.stat().st_size == source.stat().st_size  # some file systems return 0 and copy nothing
    except (AttributeError, OSError):  # not on Linux, or not supported between the two file systems
        is_whole = False
    if not is_whole:
        shutil.copyfile(source, target)
