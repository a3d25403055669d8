"""Do chats calibrate an instruction-tuned model better than plain text? SparseGPT at 50 %, perplexity on either.

    python benchmarks/chats.py TESTBED MODEL [--home STORE] [--windows 64] [--seeds 1]

TESTBED contains `corpora/{general,biomedical}` and questions `eval/*/{wordnet_terms,pubmedqa_*}.jsonl.zst`, MODEL is a
folder with a chat template. A conversation is several questions of one file, asked by the user and answered correctly
by the assistant; conversations are built when the benchmark runs and are not kept. The same conversations are used
twice: `chats` as the template renders them, `turns` as plain text, which separates the effect of the template from that
of the content. One model is calibrated on general text alone, one on each other corpus alone, one on general text and
each, half and half; every model is measured on the test windows of all corpora, also as a ratio to the dense model.
Spread is the standard deviation over draws, or for a single draw the standard error over windows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from records import load_average, record, write

from crosscal.files import JsonRecord, json_records
from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import ResultRow, read_rows

QUESTIONS = ("wordnet_terms", "pubmedqa_dev", "pubmedqa_test")
EXCHANGES = 4
"""Questions per conversation."""
SETS = ("biomedical", "chats", "turns")


def conversations(testbed: Path) -> list[dict[str, Any]]:
    """Return one row per conversation, made of consecutive questions of a file."""
    found = []
    for file in sorted(file for name in QUESTIONS for file in testbed.glob(f"eval/*/{name}.jsonl.zst")):
        rows = [one.value for one in json_records(file) if isinstance(one, JsonRecord)]
        for first in range(0, len(rows), EXCHANGES):
            found.append({"messages": [turn for row in rows[first : first + EXCHANGES] for turn in exchange(row)]})
    return found


def exchange(row: dict[str, Any]) -> list[dict[str, str]]:
    asked = row["question"].removeprefix("Question: ").removesuffix("Answer:").strip()
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["choices"][row["answer"]]}]


def plan_of(testbed: Path, chats: Path, options: argparse.Namespace) -> dict[str, Any]:
    text = {name: str(testbed / "corpora" / name) for name in ("general", "biomedical")}
    windows = {"windows": options.windows, "length": options.length, "held_out_windows": max(1, options.windows // 8)}
    return {
        "model": str(options.model.resolve()),
        "corpora": {**text, "chats": {"path": str(chats)}, "turns": {"path": str(chats), "chat": "text"}},
        "calibration": {**windows, "seed": list(range(options.seeds))},
        "compress": [{"method": "sparsegpt", "sparsity": 0.5, "domain": list(SETS), "alpha": [0, 0.5, 1]}],
        "evaluate": {"windows": options.test_windows},
        "execution": {"device": "cpu", "keep_models": False},
    }


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return perplexity and its ratio to the dense model's, per mixture and test corpus."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    errors: dict[tuple[str, str], float | None] = {}
    for row in read_rows(run_dir / "results.jsonl", ResultRow):
        if row.split == "test" and row.metric == "perplexity" and row.value is not None:
            case = " + ".join(f"{weight:g} {name}" for name, weight in sorted(row.mixture.items())) or row.method
            values[case, row.corpus_or_task].append(row.value)
            errors[case, row.corpus_or_task] = row.stderr
    found = []
    for (case, corpus), draws in values.items():
        mean, dense = statistics.mean(draws), values["dense", corpus][0]
        spread = statistics.stdev(draws) if len(draws) > 1 else errors[case, corpus]
        found.append(record(case, f"{corpus} perplexity", mean, "", spread))
        found.append(record(case, f"{corpus} over dense", mean / dense, "", None if spread is None else spread / dense))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--home", default=".crosscal-chats")
    parser.add_argument("--windows", type=int, default=64, help="for calibration, a corpus")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="to try the script: nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder, "chats.jsonl")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in conversations(options.testbed.resolve()))
        chats.write_text("".join(lines), encoding="utf-8")
        plan = parse_plan(plan_of(options.testbed.resolve(), chats, options))
        done = carry_out(plan, options.home, f"{options.home}/run")
    rows = rows_of(Path(done["run_dir"]))
    for row in rows:
        print(f"{row['case']:32} {row['figure']:24} {row['value']:9.3f}")
    for note in done["notes"]:
        print(note)
    if not options.dry:
        write("chats", [*rows, record("circumstances", "load average before", before, "processes")])


if __name__ == "__main__":
    main()
