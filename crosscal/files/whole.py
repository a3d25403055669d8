"""Files that appear complete or not at all, even if the machine crashes in between."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, then sync and rename it: a reader sees the old file or the new one, never
    a part of it. After an error nothing is left behind. Permissions follow the process's umask, because some libraries
    write files that only their owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    try:
        aside.touch()
        mode = stat.S_IMODE(aside.stat().st_mode)
        yield aside
        aside.chmod(mode)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str) -> None:
    """Write text as a `whole_file`, in UTF-8 with LF line ends."""
    with whole_file(path) as aside:
        aside.write_text(content, encoding="utf-8", newline="\n")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
