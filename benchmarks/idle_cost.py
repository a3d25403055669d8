"""Claim: idling costs little, and always the same: store operations and writes to Prefect's database of a service in
which nothing lands, with 10,000 landed files.

    python benchmarks/idle_cost.py [--files 10000] [--watches 20] [--seconds 20] [--case NAME]
    python benchmarks/idle_cost.py --store      # with 100, 1,000 and 10,000 files; no server is started

A real server with SQLite and the worker of the queue `service`, as `crosscal deploy` prints it; a watch every 20
seconds by default. Counted between two ends of watches: rows and bytes of the database by table (SQLite's `dbstat`),
divided by the number of completed watches in between; an hour is taken to have 60 watches. The store operations of a
watch are counted separately, in this process. Rows of other cases are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sqlite3
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import yaml
from local_service import ROOT, deploy, environment, free_port, server, wait_for, workers
from records import load_average, record, write

from crosscal.flows.watch import waiting_domains
from crosscal.landing import Ledger, take_in
from crosscal.landing.items import LandedFile
from crosscal.landing.records import state
from crosscal.store.journal import Journal

sys.path.insert(0, str(ROOT))
from tests.helpers.counting_home import counting_store

DOMAINS = 10
WATCHES_AN_HOUR = 60
SETTLED = 2
"""Watches before counting begins: the scheduler plans ahead, and the first watches see a new ledger."""


def fill(home: Path, landing: Path, files: int) -> None:
    """Create `files` landed and ingested files, with the newest version of each domain recompressed."""
    store, _ = counting_store(home)
    changes: dict[str, dict[str, object]] = {}
    for number in range(files):
        domain = f"d{number % DOMAINS}"
        path = landing / domain / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number}", encoding="ascii")
        path.with_name(f"{path.name}.done").touch()
        found, sha256 = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
        seen = LandedFile(domain, path.name, found.st_size, found.st_mtime)
        states = [state("landed"), state("ingested", version=number + 1)]
        entry = {"sha256": sha256, "bytes": found.st_size, "names": {path.name: seen.signature}, "states": states}
        changes[f"file/{domain}/{sha256[:16]}"] = entry
    Journal(store.refs, "landings").put(changes)
    ledger = Ledger(store)
    for number in range(DOMAINS):
        ledger.request(f"d{number}", files)
        run = ledger.claim(f"d{number}", "run")
        assert run is not None
        ledger.mark(run, "published")


def store_operations(home: Path, landing: Path) -> tuple[int, float]:
    """Return store operations and seconds of a watch: a check of the landing place and one for pending domains."""
    store, asked = counting_store(home)
    began = time.monotonic()
    ledger = Ledger(store)
    assert take_in(store, str(landing), ledger=ledger) == []
    assert waiting_domains(ledger) == {}
    return asked.total(), time.monotonic() - began


def tables(database: Path) -> dict[str, tuple[int, int]]:
    """Table → (rows, bytes including its indexes)."""
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        of_table = dict(connection.execute("SELECT name, tbl_name FROM sqlite_master"))
        bytes_of = dict.fromkeys(names, 0)
        for name, size in connection.execute("SELECT name, SUM(pgsize) FROM dbstat GROUP BY name"):
            if of_table.get(name, name) in bytes_of:
                bytes_of[of_table.get(name, name)] += size
        counts = {name: connection.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0] for name in names}
        return {name: (counts[name], bytes_of[name]) for name in names}


def ended(database: Path) -> int:
    """Return the number of completed watches; watches skipped because another was running cost less."""
    query = (
        "SELECT COUNT(*) FROM flow_run JOIN flow ON flow.id = flow_run.flow_id "
        "WHERE flow.name = 'watch' AND flow_run.state_type = 'COMPLETED'"
    )
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        return connection.execute(query).fetchone()[0]


def store_costs(files: int) -> list[dict[str, Any]]:
    """Return the cost of a check with a hundredth of the files, a tenth, and all."""
    rows = []
    for count in (files // 100, files // 10, files):
        with tempfile.TemporaryDirectory() as folder:
            home, landing = Path(folder, "home"), Path(folder, "landing")
            fill(home, landing, count)
            operations, seconds = store_operations(home, landing)
        case = f"{count:,} files"
        rows.append(record(case, "store operations of a watch", operations, "operations"))
        rows.append(record(case, "store operations an hour", operations * WATCHES_AN_HOUR, "operations"))
        rows.append(record(case, "seconds of a look", seconds, "s"))
    return rows


def database_costs(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return what Prefect's database grows by per watch and per hour."""
    fill(folder / "home", folder / "landing", options.files)
    places = {name: str(folder / name) for name in ("landing", "home", "runs")}
    service = folder / "service.yaml"
    service.write_text(yaml.safe_dump({**places, "watch": {"every_seconds": options.seconds}}))
    shared = environment(folder, free_port())
    database = folder / "prefect" / "prefect.db"
    patience = (SETTLED + options.watches) * 4 * options.seconds
    with ExitStack() as stack:
        stack.enter_context(server(folder, shared))
        made = deploy(shared, service)
        stack.enter_context(workers(folder, shared, made["workers"][-1:]))
        wait_for(lambda: ended(database) >= SETTLED, patience, every=0.5)
        first, before = ended(database), tables(database)
        wait_for(lambda: ended(database) >= first + options.watches, patience, every=0.5)
        watches, after = ended(database) - first, tables(database)
    rows = []
    for name, (count, size) in after.items():
        more = count - before[name][0], size - before[name][1]
        if any(more):
            rows.append(record(options.case, f"rows of {name} a watch", more[0] / watches, "rows"))
            rows.append(record(options.case, f"bytes of {name} a watch", more[1] / watches, "bytes"))
    total = sum(row["value"] for row in rows if row["unit"] == "bytes")
    rows.append(record(options.case, "database bytes of a watch", total, "bytes"))
    rows.append(record(options.case, "database bytes an hour", total * WATCHES_AN_HOUR, "bytes"))
    rows.append(record(options.case, "load average meanwhile", load_average(), "processes"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--watches", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=20, help="From watch to watch; more than one takes.")
    parser.add_argument("--case", default="a quiet watch")
    parser.add_argument("--store", action="store_true", help="Only what is asked of the store.")
    parser.add_argument("--keep", type=Path, help="Work in this folder and leave it there.")
    options = parser.parse_args()
    if options.store:
        rows = store_costs(options.files)
    else:
        with ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            rows = database_costs(options, folder)
    print(json.dumps(rows, indent=1))
    write("idle_cost", rows, keep=True)


if __name__ == "__main__":
    main()
