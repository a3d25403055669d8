"""What evaluating a model costs: the demo's run before and after, and its questions compared with lm-eval.

    python benchmarks/evaluation.py [--before COMMIT] [--rounds 3] [--set KEY=VALUE ...] [--dry]

Questions: the demo's three files on its dense model, by lm-eval and by crosscal alternating, in seconds of this
process, and the share of answers judged alike. Runs: `crosscal run` of the demo in a fresh store, at this commit and at
`--before` (checked out in a worktree) alternating; seconds of its stages, and CPU seconds of the whole process. "As
before": this commit with the fewest possible validation windows, which the older one did not evaluate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import median_record, record, write

from crosscal.evaluation import QuestionSuite
from crosscal.evaluation.harness import NamedTask, measure_named
from crosscal.models.loading import load_variant
from crosscal.models.source import ModelSource

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "data" / "demo"
TASKS = ("general_facts", "biomedical_facts", "legal_facts")
NO_MORE = ["evaluate.validation_windows=2"]
"""The minimum that a plan may have."""
Rows = list[dict[str, Any]]


def of_lm_eval(name: str) -> NamedTask:
    """Return a question file of the demo as an lm-eval task."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows = [json.loads(line) for line in (DEMO / "tasks" / f"{name}.jsonl").read_text().splitlines()]
    fields = {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
    config = {
        "task": name,
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " ",
        "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows)}),
        "num_fewshot": 0,
        **fields,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    return NamedTask(name, {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}, "group_map": {}})


def question_rows(rounds: int) -> Rows:
    model, tokenizer = load_variant(DEMO / "model"), ModelSource.open(DEMO / "model").tokenizer()
    suite, named = QuestionSuite.load([str(DEMO / "tasks" / f"{name}.jsonl") for name in TASKS]), map(of_lm_eval, TASKS)
    asked = list(named)
    limits = {"limit": None, "max_length": 256}
    ways: dict[str, Callable[[], list[Any]]] = {
        "lm-eval": lambda: [one for task in asked for one in measure_named(task, model, tokenizer, **limits)],
        "crosscal": lambda: suite.measure(model, tokenizer, max_length=256),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    answers = {name: [one.question_correct for one in run()] for name, run in ways.items()}  # warm-up, not timed
    for _ in range(rounds):
        for name, run in ways.items():
            started, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - started, time.process_time() - cpu))
    case = f"{sum(len(task.questions) for task in suite.local)} questions"
    rows = [
        median_record(case, f"{name}, {what}", [each[i] for each in taken], "s")
        for name, taken in seconds.items()
        for i, what in enumerate(("wall", "CPU"))
    ]
    alike = [a == b for ours, theirs in zip(*answers.values(), strict=True) for a, b in zip(ours, theirs, strict=True)]
    return [*rows, record(case, "judged as by lm-eval", 100 * statistics.mean(alike), "%")]


def run_rows(before: str, rounds: int, overrides: list[str]) -> Rows:
    with tempfile.TemporaryDirectory(prefix="crosscal-evaluation-") as folder:
        old = Path(folder, "before")
        subprocess.run(["git", "worktree", "add", "--detach", str(old), before], cwd=ROOT, check=True)
        try:
            places = {f"before ({before[:7]})": (old, []), "now": (ROOT, []), "now, windows as before": (ROOT, NO_MORE)}
            found: dict[str, list[dict[str, float]]] = {name: [] for name in places}
            for number in range(rounds):
                for index, (name, (place, settings)) in enumerate(places.items()):
                    found[name].append(one_run(place, Path(folder, f"{number}-{index}"), [*overrides, *settings]))
                    print(name, found[name][-1], flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    case = " ".join(["demo", *overrides])
    figures = [(name, figure, [run[figure] for run in runs]) for name, runs in found.items() for figure in runs[0]]
    return [median_record(f"{case}, {name}", figure, values, "s") for name, figure, values in figures]


def one_run(place: Path, home: Path, overrides: list[str]) -> dict[str, float]:
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "crosscal", "run", "--home", str(home), "--out", f"{home}-run", *settings]
    environment = {**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}
    started, cpu = time.perf_counter(), _children_seconds()
    subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True)
    whole = {"whole, wall": time.perf_counter() - started, "whole, CPU": _children_seconds() - cpu}
    stages = json.loads(Path(f"{home}-run", "run.json").read_text())["stages"]
    return {"evaluation, wall": stages["evaluate"], **whole}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry", action="store_true", help="to try the script: nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = question_rows(options.rounds)
    rows += run_rows(options.before, options.rounds, options.overrides) if options.before else []
    for row in rows:
        print(row)
    if not options.dry:
        write("evaluation", [*rows, record("circumstances", "load average", os.getloadavg()[0], "processes")])


if __name__ == "__main__":
    main()
