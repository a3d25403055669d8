"""Writing of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
