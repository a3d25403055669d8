"""The golden run: a few variants of the demo. `python -m tests.helpers.golden` regenerates its numbers.

The numbers may change only on purpose, with a line in CHANGELOG.md that explains why.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from crosscal.flows.pipeline import carry_out
from crosscal.plan import parse_plan
from crosscal.report.rows import LayerRow, ResultRow, read_rows

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo"
FILE = ROOT / "tests" / "golden.json"

PLAN = {
    "model": str(DEMO / "model"),
    "corpora": {name: str(DEMO / "corpora" / name) for name in ("general", "biomedical")},
    "calibration": {"windows": 32, "length": 128, "held_out_windows": 8},
    "compress": [
        {"method": ["magnitude", "wanda"], "sparsity": 0.6, "domain": "biomedical", "alpha": 0.5},
        {"method": "sparsegpt", "sparsity": [0.7, "2:4"], "domain": "biomedical", "alpha": [0, 0.5]},
        {"method": ["rtn", "gptq"], "bits": 3, "domain": "biomedical", "alpha": 0.5},
        {"method": "sparsegpt-gptq", "sparsity": 0.5, "bits": 4, "domain": "biomedical", "alpha": 0.5},
        {"method": "sparsegpt", "sparsity": 0.7, "domain": "biomedical", "alpha": 0.5, "upstream": "sequential"},
    ],
    "evaluate": {"windows": 16},
    "execution": {"device": "cpu"},
}


def numbers(folder: Path) -> dict[str, dict[str, float]]:
    """Return for each variant its test perplexities and its mean relative losses over all matrices."""
    record = carry_out(parse_plan(PLAN), str(folder / "home"), str(folder / "run"))
    run = Path(record["run_dir"])
    found: dict[str, dict[str, float]] = {}
    for row in read_rows(run / "results.jsonl", ResultRow):
        assert row.value is not None
        if row.split != "test":
            continue
        found.setdefault(row.variant, {})[f"{row.corpus_or_task} {row.metric}"] = row.value
    layers = read_rows(run / "layers.jsonl", LayerRow)
    for variant in {row.variant for row in layers}:
        of = [row for row in layers if row.variant == variant]
        held_out = [row.heldout_relative_loss for row in of if row.heldout_relative_loss is not None]
        assert len(held_out) == len(of)
        found[variant]["relative loss"] = statistics.fmean(row.relative_loss for row in of)
        found[variant]["held-out relative loss"] = statistics.fmean(held_out)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        FILE.write_text(json.dumps(numbers(Path(place)), indent=1, sort_keys=True) + "\n", encoding="utf-8")
