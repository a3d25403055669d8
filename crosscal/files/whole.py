"""Files that appear whole or not at all, also when the machine stops in between."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. Afterwards it is synced and renamed: a reader sees the old file or the new
    one, never half of it. After an error nothing is left. Whoever wrote it, it may be read by whom the process's umask
    says: some libraries write files that only their owner can read."""
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
    """Text in UTF-8 with plain line ends, as a `whole_file`."""
    with whole_file(path) as aside:
        aside.write_text(content, encoding="utf-8", newline="\n")


def sync(path: Path) -> None:
    """See that a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
