"""Claim: a store on S3 with a faulty connection gives the same results as a store on disk, and loses nothing.

    python benchmarks/remote_store.py

A small run of the demo (three variants) with a store on disk, on a local S3-compatible server (moto's), and on the
same server with injected faults: answers of 503, requests executed whose answer is lost, truncated bodies, late
answers. Every model must equal the local one byte for byte, and the store must verify clean. The figures are seconds of
the runs, and the number of requests by fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import load_average, record, write

sys.path.insert(0, str(Path(__file__).parents[1]))
from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.store import Store
from tests.helpers.object_store import BUCKET, at, object_store

DATA = Path(__file__).parents[1] / "data" / "demo"
FAULTS = {"unavailable": 0.03, "lost": 0.02, "truncated": 0.03, "slow": 0.01}
NAMES = {
    "unavailable": "503 before a request was looked at",
    "lost": "500 after a request was carried out",
    "truncated": "half a body under the header of all of it",
    "slow": "answered a quarter of a second late",
}


def plan() -> dict[str, Any]:
    return {
        "model": str(DATA / "model"),
        "corpora": {name: str(DATA / "corpora" / name) for name in ("general", "biomedical")},
        "calibration": {"windows": 32, "length": 128, "held_out_windows": 8},
        "compress": [
            {"method": "sparsegpt", "sparsity": 0.5, "domain": "biomedical", "alpha": [0, 0.5]},
            {"method": "gptq", "bits": 4, "group_size": 32},
        ],
        "evaluate": {"windows": 8},
        "execution": {"device": "cpu"},
    }


def run(home: str, out: Path) -> tuple[float, dict[str, Any]]:
    os.environ["CROSSCAL_CACHE"] = str(out.parent / f"cache of {out.name}")
    started = time.monotonic()
    done = carry_out(parse_plan(plan()), home, str(out))
    return time.monotonic() - started, done


def assert_equal(one: Path, other: Path) -> None:
    shards = [shard.relative_to(one) for shard in (one / "models").rglob("*.safetensors")]
    assert shards
    for shard in shards:
        assert (one / shard).read_bytes() == (other / shard).read_bytes(), shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = [record("machine", "load average before", load_average(), "processes")]
    with tempfile.TemporaryDirectory() as place, object_store() as (url, line):
        folder = Path(place)
        os.environ.update(at(url), AWS_MAX_ATTEMPTS="1")  # s3fs would hide faults by its own retries
        run(str(folder / "warm home"), folder / "warm")
        seconds, local = run(str(folder / "home"), folder / "local")
        rows.append(record("store on disk", "run", seconds, "s"))
        for case, faults in (("store on S3", dict.fromkeys(FAULTS, 0.0)), ("store on S3, bad line", FAULTS)):
            for name, chance in faults.items():
                setattr(line, name, chance)
            line.seen.clear()
            home, out = f"s3://{BUCKET}/{case.replace(' ', '-')}", folder / case
            seconds, remote = run(home, out)
            assert_equal(folder / "local", out)
            assert remote["cache"] == local["cache"]
            again, found = run(home, folder / f"{case} again")
            assert found["calibration_tokens_read"] == 0
            problems = [problem for *_, problem in Store(home).verify()]
            assert problems
            assert set(problems) == {None}
            rows.append(record(case, "run", seconds, "s"))
            rows.append(record(case, "the same plan again", again, "s"))
            rows.append(record(case, "requests, both runs and a verification", line.seen["requests"], "requests"))
            rows += [
                record(case, NAMES[name], line.seen[name], "requests") for name, chance in faults.items() if chance
            ]
            rows.append(record(case, "artifacts that verify", len(problems), "artifacts"))
    write("remote_store", rows)
    for row in rows:
        print(row["case"], row["figure"], row["value"], row["unit"], sep=" | ")


if __name__ == "__main__":
    main()
