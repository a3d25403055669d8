"""Claim: without a server, `crosscal run` costs at most 6 s or 10 % beyond its stages and the imports of any tool.

    python benchmarks/overhead.py [--repeats 3] [--plan plans/demo.yaml]

The whole command from start to exit, in its own store, minus the seconds in stages from its record, minus the import
of torch and of the part of transformers that loads a model, which every tool needs. The remainder is split into
importing Prefect, importing crosscal and its other libraries, and the rest (interpreter, plan, flow, table, and
Python's shutdown). These are wall times: run it on an idle machine; the load average is among the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from local_service import ROOT, environment
from records import cpu_model, load_average, median_record, record, write

MOST_SECONDS, MOST_SHARE = 6.0, 0.10
IMPORTS = """
import json, time
started = time.perf_counter()
import torch
import transformers.modeling_utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
any_tool = time.perf_counter()
import prefect, prefect.artifacts, prefect.futures, prefect.task_runners
from prefect import flow, task
prefect_done = time.perf_counter()
import crosscal.flows.drive, crosscal.flows.landed, crosscal.flows.pipeline
print(json.dumps([any_tool - started, prefect_done - any_tool, time.perf_counter() - prefect_done]))
"""


def command(*arguments: str) -> tuple[float, str]:
    """Run a Python process without a Prefect server; return its seconds and output."""
    with tempfile.TemporaryDirectory() as folder:
        shared = environment(Path(folder), 0)
        del shared["PREFECT_API_URL"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=shared, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds, done.stdout


def measure(plan: str) -> dict[str, float]:
    """Time one run, and the imports separately."""
    any_tool, prefect, own = json.loads(command("-c", IMPORTS)[1])
    with tempfile.TemporaryDirectory() as folder:
        places = ("--home", f"{folder}/home", "--out", f"{folder}/run")
        seconds, printed = command("-m", "crosscal", "run", plan, *places, "--json")
    stages = sum(json.loads(printed)["stages"].values())
    overhead = seconds - stages - any_tool
    return {
        "whole command": seconds,
        "stages": stages,
        "import of torch and what loads a model": any_tool,
        "overhead": overhead,
        "of it: import of Prefect": prefect,
        "of it: import of crosscal and its other libraries": own,
        "of it: the rest": overhead - prefect - own,
    }


def rows(runs: list[dict[str, float]], load: float) -> list[dict[str, Any]]:
    figures: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for name, seconds in run.items():
            figures[name].append(seconds)
    shares = [100 * run["overhead"] / run["whole command"] for run in runs]
    found = [median_record("crosscal run, no server", name, seconds, "s") for name, seconds in figures.items()]
    found.append(median_record("crosscal run, no server", "overhead over whole command", shares, "%"))
    return [*found, record("all", "load average before", load, "processes")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plan", default="plans/demo.yaml")
    options = parser.parse_args()
    load = load_average()
    command("-c", IMPORTS)  # loads the libraries' files into the page cache
    runs = [measure(options.plan) for _ in range(options.repeats)]
    for run in runs:
        print(json.dumps({name: round(seconds, 2) for name, seconds in run.items()}))
    found = rows(runs, load)
    write("overhead", found, device=f"{cpu_model()}, 1 thread")
    medians = {row["figure"]: row["value"] for row in found}
    most = max(MOST_SECONDS, MOST_SHARE * medians["whole command"])
    print(f"overhead {medians['overhead']:.1f} s, at most {most:.1f} s")
    sys.exit(medians["overhead"] > most)


if __name__ == "__main__":
    main()
