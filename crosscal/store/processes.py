"""Whose something is: a process of this machine, or of another one that shares the disk."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

ELSEWHERE_SECONDS = 7 * 86400


def this_process() -> str:
    """A name for this process, unique while it lives among all machines and containers on one disk."""
    return f"{_machine()}-{os.getpid()}"


def is_gone(process: str, idle_seconds: float) -> bool:
    """Whether a process has ended. One of another machine cannot be asked: it is given a week since its last sign."""
    machine, _, number = process.rpartition("-")
    if machine == _machine() and number.isdigit():
        return not _is_alive(int(number))
    return idle_seconds > ELSEWHERE_SECONDS


@functools.cache
def _machine() -> str:
    """Where a process number means one process: a host and, on Linux, a process namespace of it."""
    namespace = Path("/proc/self/ns/pid")
    return f"{re.sub(r'[^A-Za-z0-9.]', '_', platform.node())}.{namespace.stat().st_ino if namespace.exists() else 0}"


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True
