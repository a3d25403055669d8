"""Result files of the benchmarks: `results/<claim>.json`, one row per figure, with device, date and commit."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def log_progress() -> None:
    """Show the log lines that tell how far a long run is, with the time left."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("crosscal").setLevel(logging.INFO)


def record(case: str, figure: str, value: float, unit: str, spread: float | None = None) -> dict[str, Any]:
    """Return one figure's row; `spread` is a standard deviation, error or half range, as the benchmark states."""
    return {"case": case, "figure": figure, "value": value, "unit": unit, "spread": spread}


def write(claim: str, rows: list[dict[str, Any]], *, device: str | None = None, keep: bool = False) -> Path:
    """Write a benchmark's rows with device, date and commit. `keep`: keep earlier rows of other cases."""
    circumstances = {
        "device": device or cpu(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{claim}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if keep and path.is_file() else []
    measured = {row["case"] for row in rows}
    kept = [row for row in earlier if row["case"] not in measured]
    written = [*kept, *({**row, **circumstances} for row in rows)]
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return path


def median_record(case: str, figure: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """Return the row of the median of repeats; the spread is half their range."""
    spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
    return record(case, figure, statistics.median(values), unit, spread)


def cpu() -> str:
    """Return the processor's model and torch's number of threads, e.g. "AMD EPYC 9B14, 2 threads"."""
    import torch

    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def load_average() -> float:
    """Return the one-minute load average, which includes the benchmark's own threads."""
    return os.getloadavg()[0]


def commit() -> str:
    """Return this checkout's commit, with `-dirty` if tracked files differ, except results, which benchmarks write."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
