"""Claim: a sweep needs one calibration pass per corpus, and no window is passed through the model twice.

    python benchmarks/reuse.py TESTBED

A sweep of 16 variants (8 sparsities, 2 mixtures) on a small real model; the same plan in a new run directory; one
more sparsity; and the same plan after 1 % new documents landed in the domain's folder. The figures are calibration
tokens run through the model, seconds of calibration and of solving, and the difference between the moments of the grown
corpus, summed over its shards, and those of one pass over the same windows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import zstandard
from records import record, write

from crosscal.files.streams import chunks
from crosscal.flows.pipeline import carry_out
from crosscal.models import ModelSource
from crosscal.plan import parse_plan

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.moment_sums import difference_from_one_reading

SPARSITIES = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
LANDED = 0.01
GROWN = "the same plan after 1 % new documents"
MODEL = "llama-mix-8m"


def split_off(source: Path, folder: Path) -> list[bytes]:
    """Copy a corpus without the last 1 % of its training documents; return those."""
    shutil.copytree(source, folder)
    lines = b"".join(chunks(source / "train.jsonl.zst")).splitlines()
    kept = len(lines) - round(LANDED * len(lines))
    (folder / "train.jsonl.zst").chmod(0o644)
    (folder / "train.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines[:kept]) + b"\n"))
    return lines[kept:]


def plan(testbed: Path, domain: Path, sparsities: list[float]) -> dict[str, Any]:
    return {
        "model": str(testbed / "models" / MODEL),
        "corpora": {"general": str(testbed / "corpora" / "general"), "biomedical": str(domain)},
        "calibration": {"windows": 128, "length": 256, "held_out_windows": 16},
        "compress": [{"method": "sparsegpt", "sparsity": sparsities, "domain": "biomedical", "alpha": [0, 0.5]}],
        "evaluate": {"windows": 2},
        "execution": {"device": "cpu", "keep_models": False},
    }


def figures(case: str, run: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        record(case, "calibration tokens read", run["calibration_tokens_read"], "tokens"),
        record(case, "calibration", run["stages"]["moments"], "s"),
        record(case, "solve", run["stages"]["solve"], "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    testbed = parser.parse_args().testbed.resolve()
    with tempfile.TemporaryDirectory() as place:
        folder, home = Path(place), f"{place}/home"
        landed = split_off(testbed / "corpora" / "biomedical", folder / "biomedical")

        def run(sparsities: list[float]) -> dict[str, Any]:
            out = f"{place}/{len(list(folder.iterdir()))}"
            return carry_out(parse_plan(plan(testbed, folder / "biomedical", sparsities)), home, out)

        first = run(SPARSITIES)
        rows = figures("16 variants, two corpora", first)
        rows += figures("the same plan again, other run directory", run(SPARSITIES))
        rows += figures("one more sparsity", run([0.45]))
        (folder / "biomedical" / "landed.jsonl").write_bytes(b"\n".join(landed) + b"\n")
        grown = run(SPARSITIES)
        rows += figures(GROWN, grown)
        share = grown["calibration_tokens_read"] / first["calibration_tokens_read"]
        rows.append(record(GROWN, "of the tokens of the first reading", 100 * share, "%"))
        source = ModelSource.open(testbed / "models" / MODEL)
        apart = difference_from_one_reading(Path(grown["run_dir"]), home, "biomedical", source, folder / "elsewhere")
        rows.append(record(GROWN, "largest relative difference of moments from one reading", apart, ""))
    assert share <= 0.02, share
    assert apart <= 1e-6, apart
    write("reuse", rows)


if __name__ == "__main__":
    main()
