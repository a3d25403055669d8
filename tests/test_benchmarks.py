"""The tables of benchmarks/README.md are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).parents[1] / "benchmarks" / "table.py"


def test_tables_are_generated_from_the_results() -> None:
    done = subprocess.run([sys.executable, str(TABLE), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
