"""Process names that are unique across machines, and a check for ended processes where it can be exact."""

from __future__ import annotations

import functools
import os
import re
import secrets
from pathlib import Path

_NAME = re.compile(r"(?P<machine>[0-9a-f]{32}\.\d+)-(?P<number>\d+)-(?P<started>\d+)")


def this_process() -> str:
    """Return `<boot>.<namespace>-<number>-<start>`: unique among processes of all machines, containers and times."""
    return _name_of(os.getpid())


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def number_of(process: str) -> int:
    """Return the process id, in the process's own namespace."""
    return int(process.split("-")[1])


def has_ended(process: str) -> bool | None:
    """Return whether a process has ended: exact in the running boot and process namespace, None if unknown."""
    found = _NAME.fullmatch(process)
    if found is None or found["machine"] != _machine():
        return None
    number = int(found["number"])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it exists, but belongs to another user
    started = _started(number)
    return None if started is None else started != int(found["started"])


@functools.cache
def _name_of(number: int) -> str:
    return f"{_machine()}-{number}-{_started(number) or 0}"


@functools.cache
def _machine() -> str:
    """Return the kernel's boot id, which is unique (host names are not), and the inode of the process namespace.

    Outside Linux neither exists: then a random name, so that no other process can check whether this one has ended.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{secrets.token_hex(16)}.0"


def _started(number: int) -> int | None:
    """Return the process's start in clock ticks after boot; 0 for a zombie or dead process, None if hidden."""
    try:
        # The name may contain anything and ends at the last parenthesis. After it: the state, …, field 22 of proc(5).
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
