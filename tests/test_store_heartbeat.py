"""Heartbeats: what a living process holds stays its own, on any machine and under any host name; what a dead one
held is free after a lease, or at once if its end can be detected.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crosscal.landing import Ledger
from crosscal.store import Store, digest_of, heartbeat
from crosscal.store.heartbeat import heartbeats
from crosscal.store.processes import has_ended, number_of, this_process

KEY = digest_of("one")
BEAT, LEASE = 0.1, 3.0
AT_WORK = """
import sys, time
home, skew_seconds = sys.argv[1], float(sys.argv[2])
from crosscal.landing import Ledger
from crosscal.store import Store, heartbeat
heartbeat.BEAT_SECONDS = {beat}
right = time.time
time.time = lambda: right() + skew_seconds
store = Store(home)
store.get("moments", {key!r})
run = Ledger(store).claim("legal", "at work")
assert run is not None
with store.publish("moments", "0" * 64, {{}}) as folder:
    (folder / "half").write_bytes(b"half")
    print("at work", flush=True)
    {work}
"""
WAIT = "sys.stdin.read()"
COMPUTE = """import torch
    torch.set_num_threads(1)
    matrix = torch.rand(1500, 1500, dtype=torch.float64)
    while True: torch.linalg.eigvalsh(matrix)"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", LEASE)
    store = Store(tmp_path / "home")
    with store.publish("moments", KEY, {}) as folder:
        (folder / "a").write_bytes(b"x")
    Ledger(store).request("legal", 1)
    return store


@contextmanager
def at_work(store: Store, *, elsewhere: bool, skew_seconds: float = 0.0, work: str = WAIT) -> Iterator[int]:
    """Run a process with a claim, an artifact in use and a half-written one. `elsewhere`: in its own process namespace
    on a host of the same name, where its process id means nothing to us, as on another machine.
    """
    command = [sys.executable, "-c", AT_WORK.format(beat=BEAT, key=KEY, work=work), store.location, str(skew_seconds)]
    if elsewhere:
        unshare = shutil.which("unshare")
        if unshare is None or subprocess.run([unshare, "-pf", "true"], check=False).returncode:
            pytest.skip("a process namespace of its own takes root on Linux")
        command = [unshare, "--pid", "--fork", "--kill-child", "--mount-proc", *command]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait()  # before its input is closed: if it read the end of it first, it would end in order


def held(store: Store) -> tuple[bool, bool, bool]:
    """Return (the claim holds, the half-written artifact would stay, the artifact in use would stay)."""
    doomed = [place for place, _ in store.sweep(unused_days=0, dry_run=True)]
    return (
        Ledger(store).claim("legal", "two") is None and Ledger(store).holder("legal") is not None,
        not any(place.startswith("staging/") for place in doomed),
        f"objects/moments/{KEY}" not in doomed,
    )


@pytest.mark.parametrize("skew_seconds", [0.0, 86400.0, -86400.0])
def test_what_a_living_process_elsewhere_holds_stays_and_is_free_a_lease_after_its_death(
    store: Store, skew_seconds: float
) -> None:
    """Also when it lives longer than a lease, and with a clock that is a day off."""
    with at_work(store, elsewhere=True, skew_seconds=skew_seconds):
        (holder,) = (process for process in heartbeats(store.home).last if process != this_process())
        assert has_ended(holder) is None
        until = time.monotonic() + 1.5 * LEASE
        while time.monotonic() < until:
            assert held(store) == (True, True, True)
            time.sleep(0.2)
    died = time.monotonic()
    while time.monotonic() < died + LEASE / 2:
        assert held(store) == (True, True, True), "nobody can know yet"
        time.sleep(0.2)
    time.sleep(max(0.0, died + LEASE + 2 * BEAT - time.monotonic()))
    assert Ledger(store).holder("legal") is None
    run = Ledger(store).claim("legal", "two")
    assert run is not None
    assert run.number == 2
    swept = [place for place, _ in store.sweep(unused_days=0)]
    assert f"objects/moments/{KEY}" in swept
    assert {place.split("/")[0] for place in swept} == {"objects", "staging", "users"}


def test_what_a_killed_process_of_this_machine_held_is_free_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 1e9)
    with at_work(store, elsewhere=False):
        assert held(store) == (True, True, True)
    assert Ledger(store).holder("legal") is None
    assert Ledger(store).claim("legal", "two") is not None
    assert {place.split("/")[0] for place, _ in store.sweep()} == {"staging", "users"}


def test_a_process_gives_signs_of_life_while_torch_computes(store: Store) -> None:
    with at_work(store, elsewhere=True, work=COMPUTE):
        silent_seconds, until = [], time.monotonic() + 2 * LEASE
        while time.monotonic() < until:
            seen = heartbeats(store.home)
            silent_seconds.append(max(seen.now - at for process, at in seen.last.items() if process != this_process()))
            time.sleep(0.05)
    assert max(silent_seconds) < LEASE / 2


def test_a_name_is_of_one_boot_and_one_start() -> None:
    boot, _, rest = this_process().partition(".")
    assert has_ended(this_process()) is False
    assert has_ended(f"{boot}.{rest.rpartition('-')[0]}-1") is True, "another process had this number"
    assert has_ended(f"{'0' * 32}.{rest}") is None, "a host of the same name, or this one before it was started anew"
    assert has_ended(f"{boot}.1{rest}") is None, "another container"
    assert [has_ended(name) for name in ("", "elsewhere.1-7", "x-y-z")] == [None] * 3, "earlier versions' names"
    code = "from crosscal.store.processes import this_process; print(this_process(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as gone:
        assert gone.stdin is not None
        assert gone.stdout is not None
        name = gone.stdout.readline().strip()
        assert has_ended(name) is False
        gone.stdin.write("\n")
        gone.stdin.flush()
        while has_ended(name) is False:
            time.sleep(0.01)
        assert gone.returncode is None
        assert has_ended(name) is True, "ended, though not reaped"
    assert has_ended(name) is True
    assert number_of(this_process()) == os.getpid()


def test_a_forked_child_is_a_process_of_its_own(tmp_path: Path) -> None:
    home = Store(tmp_path).home
    (tmp_path / "users").mkdir()
    mine = heartbeat.begin(home)
    child = os.fork()
    if child == 0:
        try:
            heartbeat.begin(home)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert len(heartbeats(home).last) == 2
    assert [process for process in heartbeats(home).last if not heartbeats(home).is_gone(process)] == [mine]


def test_processes_of_earlier_versions_are_given_a_week(store: Store) -> None:
    day = 86400
    for days in (6, 8):
        user = Path(store.location) / "users" / f"elsewhere.1-{days}"
        user.touch()
        os.utime(user, (time.time() - days * day,) * 2)
    assert [place for place, _ in store.sweep()] == ["users/elsewhere.1-8"]


def test_behind_a_url_the_laws_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are measured by the object store's own times."""
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 1.0)
    store = Store(f"memory://{tmp_path.name}")
    ledger = Ledger(store)
    ledger.request("legal", 1)
    run = ledger.claim("legal", "one")
    assert run is not None
    assert ledger.holder("legal") == run
    elsewhere = f"{'0' * 32}.1-7-7"
    with monkeypatch.context() as patch:
        patch.setattr("crosscal.store.heartbeat.this_process", lambda: elsewhere)
        ledger.mark(run, "failed", reason="another's turn")
        run = ledger.claim("legal", "two")
        assert run is not None
        heartbeat._beat(store.home)
    assert run.holder == elsewhere
    assert ledger.holder("legal") == run
    assert ledger.claim("legal", "three") is None
    time.sleep(1.1)
    assert ledger.holder("legal") is None
    assert [place for place, _ in store.sweep()] == [f"users/{elsewhere}"]
    assert ledger.claim("legal", "three") is not None


def test_a_home_that_is_removed_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "home")
    with store.publish("moments", KEY, {}):
        pass
    shutil.rmtree(tmp_path / "home" / "users")
    with pytest.raises(FileNotFoundError):
        heartbeat._beat(store.home)
    assert not (tmp_path / "home" / "users").exists()
