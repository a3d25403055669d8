"""The run directory: the identity of its run, the plan, and the record of the results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from crosscal.errors import UsageError
from crosscal.files import write_whole
from crosscal.plan import CompressionPlan, dump_plan
from crosscal.resources import ROOT
from crosscal.store.keys import digest_of
from crosscal.tasks.run_spec import RunSpec

PACKAGES = ("crosscal", "torch", "transformers", "datasets", "lm-eval", "prefect", "pyarrow", "compressed-tensors")
SOLVER = 1  # a change of what the solvers compute makes new run directories


def open_run_directory(spec: RunSpec, plan: CompressionPlan, out: str | None) -> Path:
    """Create or reopen the directory of exactly this run. Raises `UsageError` when `out` holds another run."""
    inputs: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "samples": [(sample.corpus, sample.seed, *sample.keys) for sample in spec.sampled],
        "variants": [(variant.name, variant.key) for variant in spec.variants()],
        "solver": SOLVER,
    }
    if measured_on := spec.run_context().measured_on:  # for `screen`; it is measured as blocks are solved
        inputs["measured_on"] = measured_on
    identity = digest_of(inputs)
    runs = Path(os.environ.get("CROSSCAL_RUNS", "runs"))
    folder = Path(out) if out else runs / f"{Path(plan.model).name}-{identity[:8]}"
    marker = folder / "identity.json"
    if folder.exists() and not folder.is_dir():
        raise UsageError("the run directory is a file", where=str(folder), do="Choose another --out.")
    if marker.exists() and json.loads(marker.read_text())["identity"] != identity:
        raise UsageError(
            "this directory holds another run: model, data, variants or `evaluate.screen` differ",
            where=str(folder),
            do="Choose another --out, or remove the directory.",
        )
    content = {"identity": identity, **inputs, "sets": [sample.as_json() for sample in spec.sampled]}
    write_whole(marker, json.dumps(content, indent=1))
    write_whole(folder / "plan.yaml", dump_plan(plan))
    return folder.absolute()


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json`: the record with package versions, machine type and commit."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    content = {**record, "versions": versions, "machine": platform.machine(), "commit": _commit()}
    write_whole(folder / "run.json", json.dumps(content, indent=1, allow_nan=False))


def _commit() -> str | None:
    """Return the running source tree's commit, marked if it has changes; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
