"""Which calibration text, which mixture, and how sure, on a real pretrained model, by `crosscal study`.

    python benchmarks/study.py TESTBED CACHE [--model SmolLM2-135M-Instruct] [--domains biomedical legal]
                               [--parts mixing questions levels methods texts alps alps-levels]
                               [--draws 3] [--alphas 0 0.25 0.5 1 auto] [--calibration-windows 64]
                               [--windows 16 8] [--questions 64] [--most N] [--home STORE] [--dry]

TESTBED contains `corpora/{general,biomedical,legal}` and `eval/*/continuation_test.jsonl.zst`; the model comes as in
`real_models.py`. A part is one plan for one domain, its variants on `draws` draws of 64 windows of 512 tokens a corpus:

* mixing: SparseGPT at 50 % on general text, the domain, and mixtures of both, one of them found by `auto` (`--alphas`);
* questions: the same without `auto`, with questions: which of four texts is the true continuation of a corpus text;
* levels: the same mixtures with SparseGPT at 60 % and 2:4;
* methods: magnitude and Wanda at 50 %, 60 % and 2:4;
* texts: SparseGPT at 50 % on text that the model wrote without a prompt (self) or from beginnings of the domain's
  documents (self-seeded, arXiv 2410.17711), half and half with the domain or general text, and on random tokens;
* alps, alps-levels: ALPS at 50 %, and at 60 % and 2:4, which takes minutes per model to solve.

A model is measured on 16 test and 8 validation windows of 512 tokens a corpus (`--windows`): 24,600 tokens, 80 s of
two CPU cores with 135 million parameters, and as long again for 64 questions a corpus (two biomedical ones also occur
in the training text: real documents repeat themselves). A run can be interrupted and resumed; `--most` ends a part
after at most this many sets of at most 8 models of one draw, and the next call resumes. Complete results are written
after every part.

In the results: perplexities are means and standard deviations over draws; changes are against the same recipe on
general text alone (or the domain alone), in percent, ± half the 95 % interval over draws; accuracies in percent.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from real_models import MODELS, prepare
from records import log_progress, record, write

from crosscal.flows.study import carry_out_study
from crosscal.plan import CompressionPlan, parse_plan
from crosscal.report.rows import StudyRow, read_rows
from crosscal.warm_up import warm_up

DOMAINS = ("biomedical", "legal")
ALPHAS = [0.0, 0.25, 0.5, 1.0, "auto"]
LEVELS = [0.5, 0.6, "2:4"]
PARTS = ("mixing", "questions", "levels", "methods", "texts", "alps", "alps-levels")
DRY_MODEL = "llama-mix-8m"


def compress(part: str, domain: str, alphas: list[float | str]) -> list[dict[str, Any]]:
    sparsegpt, few = {"method": "sparsegpt", "sparsity": 0.5}, {"domain": domain, "alpha": [0, 0.5, 1]}
    return {
        "mixing": [{**sparsegpt, "domain": domain, "alpha": alphas}],
        "questions": [{**sparsegpt, "domain": domain, "alpha": [0, 0.25, 0.5, 1]}],
        "levels": [{**sparsegpt, "sparsity": LEVELS[1:], "domain": domain, "alpha": alphas}],
        "methods": [{"method": "magnitude", "sparsity": LEVELS}, {"method": "wanda", "sparsity": LEVELS, **few}],
        "texts": [{**sparsegpt, "mixture": texts(domain)}],
        "alps": [{"method": "alps", "sparsity": 0.5, **few}],
        "alps-levels": [{"method": "alps", "sparsity": LEVELS[1:], **few}],
    }[part]


def texts(domain: str) -> list[dict[str, float]]:
    alone: list[dict[str, float]] = [{name: 1.0} for name in ("general", domain, "self", "self-seeded", "random")]
    return [*alone, {"self": 0.5, domain: 0.5}, {"general": 0.5, "self-seeded": 0.5}]


def plan_of(part: str, domain: str, model: Path, options: argparse.Namespace) -> CompressionPlan:
    testbed = options.testbed.resolve()
    corpora = {name: str(testbed / "corpora" / name) for name in ("general", domain)}
    seeded = {"source": "self", "seeds": domain, "prefix_tokens": 4 if options.dry else 32}
    written = {"self": "self", "self-seeded": seeded, "random": "random"} if part == "texts" else {}
    asked = corpora if part == "questions" else ()
    questions = [str(testbed / "eval" / name / "continuation_test.jsonl.zst") for name in asked]
    dry = options.dry
    length, windows = (64, 8) if dry else (512, options.calibration_windows)
    return parse_plan(
        {
            "model": str(model),
            "corpora": {**corpora, **written},
            "calibration": {"windows": windows, "length": length, "held_out_windows": windows // 8},
            "compress": compress(part, domain, options.alphas),
            "evaluate": {
                "windows": 4 if dry else options.windows[0],
                "validation_windows": 2 if dry else options.windows[1],
                "tasks": questions,
                "limit": options.questions,
                "allow_leaks": [f"{name}_continuation_test" for name in asked],
            },
            "execution": {"device": "cpu"},
            "study": {"draws": options.draws, "baseline": ["general", "domain"], "models_at_once": 8},
        }
    )


def rows_of(name: str, found: list[StudyRow]) -> Iterator[dict[str, Any]]:
    """Yield the numbers on test text, and differences from either baseline."""
    for row in found:
        case, what = f"{name}, {row.variant}", f"{row.corpus_or_task} {row.metric}"
        if row.split == "validation":
            continue
        more = {"draws": row.draws, "chosen": row.chosen}
        if row.rule is None:
            scale, unit = (1.0, "perplexity") if row.metric == "perplexity" else (100.0, "%")
            spread = row.sd if row.sd is not None else row.stderr
            yield record(case, what, scale * row.value, unit, None if spread is None else scale * spread) | more
        else:
            middle, ends = _percent(row, row.value), [_percent(row, end) for end in row.interval or ()]
            half = (ends[1] - ends[0]) / 2 if ends else None
            more |= {"p": row.p, "p_holm": row.p_holm, "verdict": row.verdict}
            yield record(case, f"{what} against {row.rule}", middle, "%", half) | more


def _percent(row: StudyRow, value: float) -> float:
    return 100 * (math.expm1(value) if row.metric == "perplexity" else value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default=next(iter(MODELS)))
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--calibration-windows", type=int, default=64, help="of 512 tokens, a corpus")
    parser.add_argument("--windows", nargs=2, type=int, default=[16, 8], help="of 512 tokens: test, validation")
    parser.add_argument("--most", type=int, help="sets of 8 models that a part carries out in this call; 0: none")
    parser.add_argument("--questions", type=int, default=64, help="of each corpus, in that part")
    parser.add_argument("--alphas", nargs="+", type=lambda a: a if a == "auto" else float(a), default=ALPHAS)
    parser.add_argument("--home", default=".crosscal-study")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry", action="store_true", help="a small model and few windows; nothing is written")
    options = parser.parse_args()
    log_progress()
    torch.set_num_threads(options.threads)
    small = options.testbed.resolve() / "models" / DRY_MODEL
    model, started = small if options.dry else prepare(options.model, options.cache.resolve()), time.monotonic()
    warm_up()
    for part in options.parts:
        for domain in options.domains:
            name = f"{model.name}, {domain}, {part}"
            out = f"{options.home}/studies/{model.name}-{domain}-{part}"
            done = carry_out_study(plan_of(part, domain, model, options), options.home, out, options.most)
            rows = list(rows_of(name, read_rows(Path(done["run_dir"]) / "study.jsonl", StudyRow)))
            print(f"{time.monotonic() - started:6.0f} s  {name}: {done['parts']}, {done['stages']}", flush=True)
            if not options.dry:
                write("study", rows, keep=True)


if __name__ == "__main__":
    main()
