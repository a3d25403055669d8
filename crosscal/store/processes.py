"""A process's name, unique among machines, and whether it has ended, where that can be known for certain."""

from __future__ import annotations

import functools
import os
import re
import secrets
from pathlib import Path

_NAME = re.compile(r"(?P<machine>[0-9a-f]{32}\.\d+)-(?P<number>\d+)-(?P<started>\d+)")


def this_process() -> str:
    """`<boot>.<namespace>-<number>-<start>`: no other process, of whatever machine, container or time, is called so."""
    return _name_of(os.getpid())


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def number_of(process: str) -> int:
    """What the machine of the process calls it."""
    return int(process.split("-")[1])


def has_ended(process: str) -> bool | None:
    """Exact for a process of the running boot and process namespace; None for any other, which cannot be seen."""
    found = _NAME.fullmatch(process)
    if found is None or found["machine"] != _machine():
        return None
    number = int(found["number"])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's
    started = _started(number)
    return None if started is None else started != int(found["started"])


@functools.cache
def _name_of(number: int) -> str:
    return f"{_machine()}-{number}-{_started(number) or 0}"


@functools.cache
def _machine() -> str:
    """The kernel's random number for this boot, which names of machines are not, and the namespace that counts
    processes; where there are none (outside Linux) a name that nobody else has, so that nothing is seen from outside.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{secrets.token_hex(16)}.0"


def _started(number: int) -> int | None:
    """Clock ticks from the boot to the process's start, 0 for one that only waits to be reaped; None if hidden."""
    try:
        # Behind the name, which may hold anything but ends with the last parenthesis: state, then field 22 of proc(5).
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
