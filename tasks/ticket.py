"""What tasks hand each other: a small JSON ticket, from which each rebuilds the stage's inputs."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from crosscal.errors import ModelError, UsageError
from crosscal.models.source import ModelSource
from crosscal.plan import CompressionPlan, parse_plan
from crosscal.progress import Report, each, log_lines, reporting
from crosscal.stages.compress import Workshop
from crosscal.stages.moments import DENSE, Cached
from crosscal.stages.sample import Sample
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.tasks.artifacts import progress_shown
from crosscal.variants import GENERAL, Variant, variants


@dataclass(frozen=True)
class Ticket:
    """One run, as far as it is known: plan and places first, then the model, then what was sampled."""

    plan: dict[str, Any]
    home: str
    model: str = ""
    """Digest of the model."""
    device: str = ""
    dtype: str = ""
    """Of activations."""
    versions: dict[str, int] = field(default_factory=dict)
    """The store's name of a corpus → the version this run uses, whatever lands meanwhile."""
    run_dir: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def parsed(self) -> CompressionPlan:
        return parse_plan(self.plan)

    @property
    def store(self) -> Store:
        return Store(self.home)

    @property
    def cached(self) -> Cached:
        return Cached(self.store, self.model, DENSE, self.dtype)

    def source(self) -> ModelSource:
        plan = self.parsed
        return ModelSource.open(plan.model, plan.revision)

    @property
    def sampled(self) -> list[Sample]:
        return [Sample.from_json(sample) for sample in self.samples]

    @property
    def has_workers(self) -> bool:
        """Whether other processes, perhaps of other machines, read windows and solve blocks: they share the store."""
        return self.parsed.execution.runner == "dask"

    def source_on_worker(self) -> ModelSource:
        """The model as this machine sees it. Raises `ModelError` when it is not there, or not the run's."""
        plan = self.parsed
        remedy = "Every worker must see the same model: a hub id, or a folder of a shared disk."
        try:
            source = self.source()
        except ModelError as error:
            raise ModelError(error.what, where=f"{platform.node()}, {plan.model}", got=error.got, do=remedy) from error
        if _digest(source.path, tuple(_stamps(source.path))) != self.model:
            raise ModelError("another model than the run's", where=f"{platform.node()}, {plan.model}", do=remedy)
        resolve_device(self.device)
        return source

    def workshop(self) -> Workshop:
        samples = self.sampled
        corpora = {sample.corpus for sample in samples}
        reference = next((sample.corpus for sample in samples if GENERAL not in corpora), GENERAL)
        return Workshop(
            folder=Path(self.run_dir),
            source=self.source(),
            cached=self.cached,
            samples={(sample.corpus, sample.seed): sample for sample in samples},
            reference=Mixture.of({reference: 1.0}),
            device=self.device,
        )

    def variants(self, upstream: str | None = None) -> list[Variant]:
        return [variant for variant in variants(self.parsed) if upstream in (None, variant.upstream)]


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    for file in sorted(folder.iterdir()):
        yield file.name, file.stat().st_size, file.stat().st_mtime_ns


@functools.lru_cache(maxsize=1)
def _digest(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """A model's digest, made once in a process as long as its files stay what they are."""
    return ModelSource.open(folder).digest


def resolve_device(wanted: str) -> str:
    """`auto` is a GPU where there is one. Raises `UsageError` for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no GPU is visible to torch", where="execution.device", got=wanted, do="Use `cpu` or `auto`.")
    return wanted


@contextmanager
def task_report() -> Iterator[Report]:
    """Progress of a task: log lines and an artifact in a Prefect run, a bar or log lines otherwise."""
    if TaskRunContext.get() is not None:
        with progress_shown() as shown:
            yield each(log_lines(get_run_logger().info), shown)
    else:
        with reporting() as report:
            yield report
