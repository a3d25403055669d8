"""What a run wrote: the files of its models, and its rows about layers."""

from __future__ import annotations

import json
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows_without_times(folder: Path) -> dict[str, list[dict]]:
    return {
        str(file.relative_to(folder)): [{**json.loads(line), "seconds": None} for line in file.read_text().splitlines()]
        for file in sorted((folder / "layers").rglob("*.jsonl"))
    }
