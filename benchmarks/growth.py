"""Claim: a corpus can grow without limit: all documents count, however they land; disk and time per landing stay flat.

    python benchmarks/growth.py [--landings 100]

The demo's model and texts. First, 150 biomedical documents, each shorter than a window of 256 tokens, land in one file,
in 25 files of six and in 150 files of one: the share of the training tokens that is used in the Hessian, and the
perplexity on the domain's test text of a model pruned to 70 % on half general, half domain text, against general text
alone. Then 100 landings of five documents, each followed by a recompression (one variant, half general, half domain,
not evaluated): bytes in the store, sets of moments per solve, calibration tokens, and seconds. Seconds are medians over
ten landings, the spread is half their range.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zstandard
from records import load_average, median_record, record, write

from crosscal.corpora import documents, ingest, load_corpus
from crosscal.flows.pipeline import carry_out
from crosscal.models import ModelSource
from crosscal.plan import parse_plan
from crosscal.store import Store

DEMO = Path(__file__).parents[1] / "data" / "demo"
FILES = {"one": 150, "few": 6, "single": 1}
CASES = {"one": "150 documents in one file", "few": "in 25 files of six", "single": "in 150 files of one"}
FIRST, EACH, APART = 50, 5, 4
SHOWN = (1, 5, 10, 20, 50, 100)
MEDIAN_OF = 10


def lines() -> list[bytes]:
    packed = (DEMO / "corpora" / "biomedical" / "train.jsonl.zst").read_bytes()
    return zstandard.decompress(packed, max_output_size=1 << 28).splitlines()


def land(store: Store, folder: Path, name: str, landed: Sequence[bytes]) -> None:
    file = folder / f"{name}.jsonl"
    file.write_bytes(b"\n".join(landed) + b"\n")
    ingest(store, name, [str(file)])


def plan(domains: list[str], **more: Any) -> dict[str, Any]:
    return {
        "model": str(DEMO / "model"),
        "corpora": {"general": {}, **{name: {} for name in domains}},
        "execution": {"device": "cpu", "keep_models": False},
        **more,
    }


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text(encoding="utf-8"))


def parts(sums: dict[str, Any]) -> list[dict[str, Any]]:
    return [*sums["apart"], *([sums["folded"]] if sums["folded"] else [])]


def small_landings(store: Store, folder: Path) -> list[dict[str, Any]]:
    """Measure the share of training tokens used and domain perplexity, for each way in which the documents land."""
    for name, size in FILES.items():
        for start in range(0, 150, size):
            land(store, folder, name, lines()[start : min(start + size, 150)])
    run = folder / "small"
    compress = [{"method": "sparsegpt", "sparsity": 0.7, "domain": [*FILES], "alpha": [0, 0.5]}]
    calibration = {"windows": 128, "length": 256, "held_out_windows": 8}
    evaluate = {"perplexity": [*FILES], "windows": 16}
    asked = plan([*FILES], compress=compress, calibration=calibration, evaluate=evaluate)
    carry_out(parse_plan(asked), store.location, str(run))
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    of_test = [row for row in results if row["split"] == "test"]
    found = {(row["variant"], row["corpus_or_task"]): (row["value"], row["stderr"]) for row in of_test}
    tokenizer, rows = ModelSource.open(DEMO / "model").tokenizer(), []
    for sample in read(run, "identity.json")["sets"]:
        name = sample["corpus"]
        if name not in FILES:
            continue
        shards = load_corpus(store, name).shards
        texts = [text for shard in shards for text in documents(store, shard, "train")]
        tokens = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
        drawn = sum(part["tokens"] for part in parts(sample["calibration"]))
        rows.append(record(CASES[name], "training tokens in the Hessian", 100 * drawn / tokens, "%"))
        for variant, mixture in (("general", "general text alone"), (f"{name}-a0.5", "half general, half domain")):
            value, error = found[f"sparsegpt-70-{variant}", name]
            rows.append(record(CASES[name], f"domain perplexity, {mixture}", value, "perplexity", error))
    return rows


def stored_bytes(home: Path, kind: str = "*") -> int:
    return sum(file.stat().st_size for file in (home / "objects").glob(f"{kind}/*/*"))


def landing(store: Store, folder: Path, number: int) -> dict[str, float]:
    """Land documents, recompress, and return the figures."""
    start = FIRST + EACH * (number - 1)
    land(store, folder, "domain", lines()[start : start + EACH] if number else lines()[:FIRST])
    compress = [{"method": "sparsegpt", "sparsity": 0.5, "domain": "domain", "alpha": 0.5}]
    calibration = {"windows": 64, "length": 128, "held_out_windows": 16, "parts_kept_apart": APART}
    asked = plan(["domain"], compress=compress, calibration=calibration, evaluate={"perplexity": []})
    run, started = folder / f"run-{number}", time.monotonic()
    made = carry_out(parse_plan(asked), store.location, str(run))
    seconds = time.monotonic() - started
    sample = next(each for each in read(run, "identity.json")["sets"] if each["corpus"] == "domain")
    home = Path(store.location)
    return {
        "seconds": seconds,
        "sets": sum(len(parts(sample[split])) for split in ("calibration", "held_out")),
        "tokens": made["calibration_tokens_read"],
        "moments": stored_bytes(home, "moments") / 2**20,
        "other": (stored_bytes(home) - stored_bytes(home, "moments")) / 2**20,
    }


def grown(store: Store, folder: Path, landings: int) -> list[dict[str, Any]]:
    """Return the cost at the landings shown; seconds are medians over the ten up to each."""
    landing(store, folder, 0)
    seen = []
    for number in range(1, landings + 1):
        seen.append(landing(store, folder, number))
        print(f"landing {number}: {seen[-1]}", flush=True)
    rows = []
    for number in [number for number in SHOWN if number <= landings]:
        last, case = seen[number - 1], f"landing {number}"
        window = [each["seconds"] for each in seen[max(0, number - MEDIAN_OF) : number]]
        rows += [
            record(case, "sets of moments a solve reads, domain", last["sets"], "sets"),
            record(case, "calibration tokens read", last["tokens"], "tokens"),
            record(case, "moments in the store", last["moments"], "MiB"),
            record(case, "all else in the store", last["other"], "MiB"),
            median_record(case, "recompression", window, "s"),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landings", type=int, default=100)
    landings = parser.parse_args().landings
    torch.set_num_threads(1)
    rows = [record("circumstances", "load average before", load_average(), "processes")]
    with tempfile.TemporaryDirectory() as place:
        for name, work in (("small", small_landings), ("grown", lambda *at: grown(*at, landings))):
            folder = Path(place, name)
            folder.mkdir()
            store = Store(folder / "home")
            ingest(store, "general", [str(DEMO / "corpora" / "general")])
            rows += work(store, folder)
    rows.append(record("circumstances", "load average after", load_average(), "processes"))
    write("growth", rows)


if __name__ == "__main__":
    main()
