"""Do chats calibrate an instruction-tuned model better than plain text? A study of SparseGPT at 50 %.

    python benchmarks/chats.py TESTBED CACHE [--model SmolLM2-135M-Instruct] [--windows 8 4] [--draws 3]
                               [--most N] [--home STORE] [--dry]

TESTBED contains `corpora/general` and questions `eval/*/{wordnet_terms,pubmedqa_*}.jsonl.zst`; the model comes as in
`real_models.py`. A conversation is several questions of one file, asked by the user and answered correctly by the
assistant; conversations are built when the benchmark runs and stay in its store. The same conversations are used twice:
`chats` as the model's template renders them, `turns` as plain text, which separates the effect of the template from
that of the content. One model is calibrated on general text alone, one on each of the two alone, one on general text
and each, half and half; all are measured on the test windows of the three.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from real_models import MODELS, prepare
from records import log_progress, write
from study import rows_of

from crosscal.files import JsonRecord, json_records
from crosscal.flows.study import carry_out_study
from crosscal.plan import CompressionPlan, parse_plan
from crosscal.report.rows import StudyRow, read_rows

QUESTIONS = ("wordnet_terms", "pubmedqa_dev", "pubmedqa_test")
EXCHANGES = 4
"""Questions per conversation."""
BASELINES = ["general", "turns", "sparsegpt-50-turns-a0.5"]


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


def written(testbed: Path, home: Path) -> Path:
    """Write the conversations, the same bytes each time, and return their file."""
    home.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in conversations(testbed))
    (home / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    return home / "chats.jsonl"


def plan_of(testbed: Path, chats: Path, model: Path, options: argparse.Namespace) -> CompressionPlan:
    alone: list[dict[str, float]] = [{"general": 1.0}, {"turns": 1.0}, {"chats": 1.0}]
    halves = [{"general": 0.5, name: 0.5} for name in ("turns", "chats")]
    length, windows = (128, 8) if options.dry else (512, 64)
    return parse_plan(
        {
            "model": str(model),
            "corpora": {
                "general": str(testbed / "corpora" / "general"),
                "chats": {"path": str(chats)},
                "turns": {"path": str(chats), "chat": "text"},
            },
            "calibration": {"windows": windows, "length": length, "held_out_windows": windows // 8},
            "compress": [{"method": "sparsegpt", "sparsity": 0.5, "mixture": [*alone, *halves]}],
            "evaluate": {"windows": options.windows[0], "validation_windows": options.windows[1]},
            "execution": {"device": "cpu"},
            "study": {"draws": options.draws, "baseline": BASELINES, "models_at_once": 5},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default=next(iter(MODELS)))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--windows", nargs=2, type=int, default=[8, 4], help="of 512 tokens: test, validation")
    parser.add_argument("--most", type=int, help="draws to carry out in this call; 0: none")
    parser.add_argument("--home", default=".crosscal-study")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry", action="store_true", help="few windows; nothing is written")
    options = parser.parse_args()
    log_progress()
    torch.set_num_threads(options.threads)
    testbed, model = options.testbed.resolve(), prepare(options.model, options.cache.resolve())
    plan = plan_of(testbed, written(testbed, Path(options.home).resolve()), model, options)
    done = carry_out_study(plan, options.home, f"{options.home}/studies/{model.name}-chats", options.most)
    rows = list(rows_of(model.name, read_rows(Path(done["run_dir"]) / "study.jsonl", StudyRow)))
    for row in rows:
        print(f"{row['case']:56} {row['figure']:40} {row['value']:9.3f}")
    if not options.dry:
        write("chats", rows)


if __name__ == "__main__":
    main()
