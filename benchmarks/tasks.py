"""Do tasks distinguish models? Continuation choice on real text: dense against chance, pruned against dense.

    python benchmarks/tasks.py TESTBED [--model FOLDER] [--questions 200] [--home STORE]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`, the default model. SparseGPT at 50, 60
and 70 % on half general, half biomedical text; `--questions` questions from each corpus's test documents: which of four
texts are the next 20 words after 64. A row is an accuracy with its standard error (chance is 25 %); for pruned models
also the change against dense on the same questions with the p of McNemar's exact test.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from records import record, write

from crosscal.evaluation.mcnemar import AnswerChange
from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import ResultRow, read_rows

CORPORA = ("general", "biomedical", "legal")
CHOICES = 4


def plan_of(testbed: Path, model: Path, questions: int) -> dict[str, Any]:
    asked = [{"continuation": corpus, "questions": questions, "choices": CHOICES} for corpus in CORPORA]
    return {
        "model": str(model),
        "corpora": {name: str(testbed / "corpora" / name) for name in CORPORA},
        "calibration": {"windows": 64, "length": 256, "held_out_windows": 2},
        "compress": [{"method": "sparsegpt", "sparsity": [0.5, 0.6, 0.7], "domain": "biomedical", "alpha": 0.5}],
        "evaluate": {"perplexity": [], "tasks": asked},
        "execution": {"device": "cpu", "keep_models": False},
    }


def rows_of(results: list[ResultRow], name: str, questions: int) -> list[dict[str, Any]]:
    rows = []
    for row in results:
        if row.metric != "acc" or row.value is None:
            continue
        task = row.corpus_or_task.removesuffix("-continuation")
        error = None if row.stderr is None else 100 * row.stderr
        level = "dense" if row.method == "dense" else f"{row.setting['sparsity']:.0%} pruned"
        case = f"{name}, {level}"
        rows.append(record(case, f"{task} accuracy", 100 * row.value, "%", error))
        if row.lost is not None and row.won is not None and row.p is not None:
            found = AnswerChange(questions, row.lost, row.won)
            rows.append(record(case, f"{task} against dense", found.points, "points"))
            rows.append(record(case, f"{task} lost", row.lost, "questions"))
            rows.append(record(case, f"{task} won", row.won, "questions"))
            rows.append(record(case, f"{task} p", row.p, "probability"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--home", default=".crosscal-tasks")
    arguments = parser.parse_args()
    model = (arguments.model or arguments.testbed / "models" / "llama-mix-8m").resolve()
    plan = parse_plan(plan_of(arguments.testbed.resolve(), model, arguments.questions))
    done = carry_out(plan, arguments.home, f"{arguments.home}/runs/{model.name}")
    results = read_rows(Path(done["run_dir"]) / "results.jsonl", ResultRow)
    write(f"tasks_{model.name.lower()}", rows_of(results, model.name, arguments.questions))


if __name__ == "__main__":
    main()
