"""Do DSIR and ZIP-FIT find a domain's documents in a large pool, and MinHash the near-duplicates? Real text.

    nice -n 10 python benchmarks/choosing.py TESTBED [--seeds 3] [--part planted|duplicates|perplexity]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`.

* planted: 1 or 5 % as many documents of a domain are planted among 1000 general training documents; as many are chosen
  as were planted, with 100 other documents of the domain as the target. Precision (here equal to recall), recall of
  twice as many, processor time and peak memory; means and standard deviations over seeds, which draw documents and
  sample.
* duplicates: general documents and edited copies; the share of copies that is found, by exact Jaccard similarity.
* perplexity: SparseGPT at 70 % on the small model, calibrated on the chosen documents, on a random choice and on the
  planted documents alone; general and domain test perplexities. 5 % planted, one draw of the windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import statistics
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from records import record, write

from crosscal.corpora import ingest
from crosscal.files import JsonRecord, json_records
from crosscal.progress import silent
from crosscal.selection import SelectionSettings, select
from crosscal.selection.choosing import KIND
from crosscal.selection.chosen import read_chosen
from crosscal.selection.distinct import distinct
from crosscal.selection.near_duplicates import jaccard, shingles
from crosscal.selection.texts import DocumentTexts, parts_of
from crosscal.store import Store

DOMAINS = ("biomedical", "legal")
METHODS = ("dsir", "zip-fit", None)
SHARES = (0.01, 0.05)
GENERAL, SAMPLE, ORIGINALS = 1000, 100, 1500
EDITED = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05)


@cache
def texts_of(testbed: Path, corpus: str) -> list[str]:
    path = testbed / "corpora" / corpus / "train.jsonl.zst"
    return [row.value["text"].strip() for row in json_records(path, 2**26, 2**36) if isinstance(row, JsonRecord)]


def write_texts(folder: Path, texts: list[str], split: str | None = None) -> str:
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / f"{split or 'all'}.jsonl").write_text(rows, encoding="utf-8")
    return str(folder)


def mixed(testbed: Path, domain: str, share: float, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return (pool, planted, sample), shuffled by the seed."""
    chance = random.Random(f"{domain} {share} {seed}")
    general, own = texts_of(testbed, "general"), list(texts_of(testbed, domain))
    chance.shuffle(own)
    general = chance.sample(general, GENERAL)
    planted = own[SAMPLE : SAMPLE + round(share * len(general))]
    pool = general + planted
    chance.shuffle(pool)
    return pool, planted, own[:SAMPLE]


def choices(testbed: Path, domain: str, share: float, seed: int) -> dict[str, dict[str, float]]:
    """Method → figures."""
    pool, planted, sample = mixed(testbed, domain, share, seed)
    wanted = {hashlib.sha256(text.encode()).digest() for text in planted}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "home")
        corpora = {
            name: ingest(store, name, [write_texts(Path(folder) / name, texts)], split=split).corpus
            for name, texts, split in (("pool", pool, "train"), ("sample", sample, None))
        }
        for method in METHODS:
            before, started = reset_peak(), time.process_time()
            settings = SelectionSettings(method, documents=2 * len(wanted), seed=seed)
            chosen = select(store, "chosen", corpora["pool"], corpora["sample"] if method else None, settings)
            seconds, after = time.process_time() - started, peak()
            ranked = [digest in wanted for digest, _ in read_chosen(store, KIND, chosen.key)]
            found[method or "random"] = {
                "precision": sum(ranked[: len(wanted)]) / len(wanted),
                "recall of twice as many": sum(ranked) / len(wanted),
                "processor time": seconds,
                "peak memory above the start": (after - before) / 1024,
            }
    return found


def peak() -> int:
    """Return peak resident memory since the last reset in KiB (Linux)."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


UNITS = {"processor time": "s", "peak memory above the start": "MiB"}


def planted(testbed: Path, seeds: int) -> list[dict[str, Any]]:
    figures: dict[tuple[str, str], list[float]] = {}
    for domain in DOMAINS:
        for share in SHARES:
            for seed in range(seeds):
                done = choices(testbed, domain, share, seed)
                print(domain, share, seed, done, flush=True)
                for method, measured in done.items():
                    for figure, value in measured.items():
                        figures.setdefault((f"{domain}, {share:.0%} planted, {method}", figure), []).append(value)
    return [
        record(case, figure, statistics.mean(v), UNITS.get(figure, ""), statistics.stdev(v) if seeds > 1 else None)
        for (case, figure), v in figures.items()
    ]


def edited(text: str, share: float, chance: random.Random) -> str:
    """Replace this share of the words by other words of the text."""
    words = text.split()
    for place in chance.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = chance.choice(words)
    return " ".join(words)


def duplicates(testbed: Path) -> list[dict[str, Any]]:
    """Measure near-duplicate detection on each original once, plus one edited copy of every second original."""
    chance, originals = random.Random(0), texts_of(testbed, "general")[:ORIGINALS]
    copies = {number: edited(originals[number], chance.choice(EDITED), chance) for number in range(0, ORIGINALS, 2)}
    truth = {n: jaccard(shingles(originals[n]), shingles(copy)) for n, copy in copies.items()}
    with tempfile.TemporaryDirectory() as folder:
        store, texts = Store(Path(folder) / "home"), [*originals, *copies.values()]
        corpus = ingest(store, "pool", [write_texts(Path(folder) / "pool", texts)], split="train").corpus
        pool = DocumentTexts(store, parts_of([corpus], "train"))
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        walk = distinct(pool, range(len(pool)), len(pool), DocumentTexts(store, []), 0.8, silent)
        seconds = time.process_time() - started
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        kept = {pool.digest(position) for position in walk.chosen}
    case, rows = f"near-duplicates at .8, {ORIGINALS:,} documents and {len(copies):,} edited copies", []

    def is_kept(text: str) -> bool:
        return hashlib.sha256(text.strip().encode()).digest() in kept

    def lost_one(number: int) -> bool:
        return not (is_kept(originals[number]) and is_kept(copies[number]))

    for low, high in ((0.8, 0.85), (0.85, 0.9), (0.9, 1.01)):
        band = [number for number, value in truth.items() if low <= value < high]
        share = sum(map(lost_one, band)) / len(band)
        rows.append(record(case, f"found of {len(band)} pairs of similarity {low} to {min(1, high)}", share, ""))
    below = [number for number, value in truth.items() if value < 0.8]
    rows.append(record(case, f"dropped of {len(below)} pairs below .8", sum(map(lost_one, below)) / len(below), ""))
    alone = [number for number in range(1, ORIGINALS, 2) if not is_kept(originals[number])]
    rows.append(record(case, f"dropped of {ORIGINALS // 2:,} documents without a copy", len(alone), ""))
    rows.append(record(case, "processor time a document", 1e3 * seconds / len(texts), "ms"))
    rows.append(record(case, "memory a document", 1024 * memory / len(texts), "KiB"))
    return rows


def perplexity(testbed: Path, domain: str) -> list[dict[str, Any]]:
    from crosscal.flows.pipeline import carry_out
    from crosscal.plan import parse_plan
    from crosscal.report.rows import ResultRow, read_rows

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pool, own, sample = mixed(testbed, domain, 0.05, 0)
        pool_path = write_texts(Path(folder) / "pool", pool, "train")
        chosen = {"path": pool_path, "select": {"towards": "sample", "documents": len(own)}}
        every = {
            "dsir": chosen | {"select": chosen["select"] | {"method": "dsir"}},
            "zip-fit": chosen | {"select": chosen["select"] | {"method": "zip-fit"}},
            "random": {"path": pool_path, "select": {"documents": len(own)}},
            "planted": write_texts(Path(folder) / "planted", own),
        }
        halves = [{name: 0.5, "general": 0.5} for name in every]
        plan = {
            "model": str(testbed / "models" / "llama-mix-8m"),
            "corpora": {
                "general": str(testbed / "corpora" / "general"),
                domain: str(testbed / "corpora" / domain),
                "sample": write_texts(Path(folder) / "sample", sample),
                **every,
            },
            "calibration": {"windows": 128, "length": 256, "held_out_windows": 8},
            "compress": [
                {"method": "sparsegpt", "sparsity": 0.7, "mixture": [{name: 1} for name in every]},
                {"method": "sparsegpt", "sparsity": 0.7, "mixture": halves},
            ],
            "evaluate": {"windows": 48, "perplexity": ["general", domain]},
            "execution": {"device": "cpu", "keep_models": False},
        }
        done = carry_out(parse_plan(plan), str(Path(folder) / "home"), str(Path(folder) / "run"))
        print(*(note for note in done["notes"] if " chosen" in note), sep="\n")
        for row in read_rows(Path(done["run_dir"]) / "results.jsonl", ResultRow):
            if row.value is not None and row.split == "test":
                case = f"{domain}: {row.variant}"
                rows.append(record(case, f"{row.corpus_or_task} perplexity", row.value, ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=["planted", "duplicates", "perplexity"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    testbed = arguments.testbed.resolve()
    parts = {
        "duplicates": lambda: duplicates(testbed),
        "planted": lambda: planted(testbed, arguments.seeds),
        **{f"perplexity {domain}": partial(perplexity, testbed, domain) for domain in DOMAINS},
    }
    for part, measure in parts.items():
        if arguments.part in (None, part.split()[0]):
            write("choosing", measure(), keep=True)


if __name__ == "__main__":
    main()
