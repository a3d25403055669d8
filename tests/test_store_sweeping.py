"""Sweeping a store removes what was long unused, but no documents and nothing that a living process holds or uses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from crosscal.store import Store, digest_of
from crosscal.store.processes import this_process
from tests.helpers.artifacts import DAY, KEY, folder_of, put


def age(store: Store, days: float, kind: str = "moments", key: str = KEY) -> None:
    then = time.time() - days * DAY
    os.utime(folder_of(store, kind, key) / "manifest.json", (then, then))


def test_sweep_removes_what_was_long_unused_and_never_documents(store: Store) -> None:
    old, used, corpus = digest_of("old"), digest_of("used"), digest_of("corpus")
    put(store, key=old)
    put(store, key=used)
    put(store, kind="corpora", key=corpus)
    for kind, key in (("moments", old), ("moments", used), ("corpora", corpus)):
        age(store, 40, kind, key)
    store.get("moments", used)
    expected = [(f"objects/moments/{old}", "unused for 30 days")]
    assert list(store.sweep(unused_days=30, dry_run=True)) == expected
    assert folder_of(store, key=old).exists()
    list(store.verify())  # verifying and listing do not count as use
    list(store.list())
    assert list(store.sweep(unused_days=30)) == expected
    assert {a.key for a in store.list()} == {used, corpus}
    assert list((Path(store.location) / "staging").iterdir()) == []
    assert list(store.sweep(unused_days=30)) == []


def test_sweep_keeps_whatever_a_process_at_work_has_used(store: Store) -> None:
    before, used = digest_of("before"), digest_of("used")
    put(store, key=before)
    put(store, key=used)
    age(store, 3, key=before)
    age(store, 3, key=used)
    script = (
        "import sys; from crosscal.store import Store; s = Store(sys.argv[1]); s.get('moments', sys.argv[2]);"
        "print('used', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, store.location, used]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as at_work:
        assert at_work.stdout is not None
        assert at_work.stdout.readline()
        time.sleep(0.02)
        assert [place for place, _ in store.sweep(unused_days=0)] == [f"objects/moments/{before}"]
        at_work.kill()
    swept = [place for place, _ in store.sweep(unused_days=0)]
    assert f"objects/moments/{used}" in swept
    assert any(place.startswith("users/") for place in swept)


def test_sweep_leaves_the_work_of_living_processes_and_of_other_machines(store: Store) -> None:
    staging = Path(store.location) / "staging"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = f"{this_process().partition('-')[0]}-{dead.pid}-1"
    with store.publish("moments", KEY, {}) as mine:
        for name in (f"{gone}-0a", "another.1-77-0b", "another.1-78-0c", "what-is-this"):
            (staging / name).mkdir()
            (staging / name / "file").write_text("x")
        old = time.time() - 8 * DAY
        for path in (staging / "another.1-78-0c" / "file", staging / "another.1-78-0c"):
            os.utime(path, (old, old))
        os.utime(mine, (old, old))
        assert {place for place, _ in store.sweep()} == {f"staging/{gone}-0a", "staging/another.1-78-0c"}
        assert {path.name for path in staging.iterdir()} == {mine.name, "another.1-77-0b", "what-is-this"}
    assert store.find("moments", KEY) is not None
