"""What every benchmark writes: `results/<claim>.json`, one row a figure, each with its circumstances."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(case: str, figure: str, value: float, unit: str, spread: float | None = None) -> dict[str, Any]:
    """One figure; `spread` is a standard deviation or error, as the benchmark says."""
    return {"case": case, "figure": figure, "value": value, "unit": unit, "spread": spread}


def write(claim: str, rows: list[dict[str, Any]], *, device: str | None = None) -> Path:
    """Write a benchmark's rows with device, date and commit."""
    circumstances = {
        "device": device or f"{platform.machine()} CPU",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{claim}.json"
    path.write_text(json.dumps([{**row, **circumstances} for row in rows], indent=1) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """The commit of this checkout, `-dirty` when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
