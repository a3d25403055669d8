"""Whose something is: a process of this machine, or of another one that shares the disk."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import psutil

ELSEWHERE_SECONDS = 7 * 86400
CLOCK_SECONDS = 5.0
"""Less than this between two starts is one start: the machine's clock is set now and then."""


def this_process() -> str:
    """A name for this process, unique while it lives among all machines and containers on one disk."""
    return f"{_machine()}-{os.getpid()}"


def is_gone(process: str, idle_seconds: float) -> bool:
    """Whether a process has ended. One of another machine cannot be asked: it is given a week since its last sign."""
    machine, _, number = process.rpartition("-")
    if machine == _machine() and number.isdigit():
        return not _is_alive(int(number))
    return idle_seconds > ELSEWHERE_SECONDS


def is_here(process: str) -> bool:
    """Whether a process is, or was, one of this machine, so that it can be seen."""
    return process.rpartition("-")[0] == _machine()


@functools.cache
def process_started() -> float:
    """When this process started, in seconds since 1970: numbers of processes are given out again."""
    return psutil.Process().create_time()


def is_ended(process: str, started: float) -> bool:
    """Whether a process of this machine has ended, even if another has its number now."""
    try:
        return abs(psutil.Process(int(process.rpartition("-")[2])).create_time() - started) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False  # somebody else's


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
