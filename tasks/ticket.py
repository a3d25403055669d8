"""What tasks hand each other: a small JSON ticket, from which each rebuilds the stage's inputs."""

from __future__ import annotations

import functools
import json
import platform
import re
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
from crosscal.progress import Report, each, logged, reporting
from crosscal.stages.block_problem import gradients_needed, statistics_needed
from crosscal.stages.compress import Workshop
from crosscal.stages.gradients import CachedGradients, Gradients
from crosscal.stages.moments import DENSE, Cached
from crosscal.stages.sample import Sample
from crosscal.statistics import EVERY, Mixture
from crosscal.store import Store
from crosscal.tasks.artifacts import progress_shown
from crosscal.variants import GENERAL, Variant, variants

SEEN_BY_ALL = "Every worker must see the same model: a hub id, or a folder of a shared disk."


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
    to_make: list[str] | None = None
    """Names of the variants whose models are wanted, or whose numbers are not known yet; None before that is found."""
    mixtures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Variant → the weights that were found, where the plan leaves them open."""

    @property
    def parsed(self) -> CompressionPlan:
        return _asked(json.dumps(self.plan))[0]

    @property
    def store(self) -> Store:
        return Store(self.home)

    @property
    def cached(self) -> Cached:
        """What is read of the dense model, which is one stream."""
        wanted = statistics_needed(self.variants()) & EVERY
        return Cached(self.store, self.model, DENSE, self.dtype, wanted=wanted)

    def source(self) -> ModelSource:
        """The run's model, opened once in a process for as long as its files stay what they are.

        Raises `ModelError` when it is not there, or once the run has begun with another content of its files.
        """
        plan = self.parsed
        folder = Path(plan.model).expanduser()
        if not folder.is_dir():
            folder = _from_hub(plan.model, plan.revision, self.model)
        source = _opened(folder, plan.revision, tuple(_stamps(folder)))
        if self.model and source.digest != self.model:
            raise ModelError(
                "another model than the run's",
                where=f"{platform.node()}, {plan.model}",
                do=f"Leave a model's files alone while a run reads them. {SEEN_BY_ALL}",
            )
        return source

    @property
    def sampled(self) -> list[Sample]:
        return [Sample.from_json(sample) for sample in self.samples]

    @property
    def has_workers(self) -> bool:
        """Whether other processes, perhaps of other machines, read windows and solve blocks: they share the store."""
        return self.parsed.execution.runner == "dask"

    def source_on_worker(self) -> ModelSource:
        """The model as this machine sees it. Raises `ModelError` when it is not there, or not the run's."""
        try:
            source = self.source()
        except ModelError as error:
            where = f"{platform.node()}, {self.parsed.model}"
            raise ModelError(error.what, where=where, got=error.got, do=SEEN_BY_ALL) from error
        resolve_device(self.device)
        return source

    @property
    def reference(self) -> Mixture:
        """Where the losses of methods without data are measured."""
        corpora = [sample["corpus"] for sample in self.samples] or list(self.parsed.corpora)
        return Mixture.of({GENERAL if GENERAL in corpora else corpora[0]: 1.0})

    @property
    def over_gradients(self) -> set[tuple[str, int]]:
        """The (corpus, seed) pairs over which some step needs the loss's gradients."""
        return gradients_needed(self.variants(), self.reference)

    def workshop(self) -> Workshop:
        samples = {(sample.corpus, sample.seed): sample for sample in self.sampled}
        cached = self.cached
        return Workshop(
            folder=Path(self.run_dir),
            source=self.source(),
            cached=cached,
            samples=samples,
            reference=self.reference,
            device=self.device,
            gradients=Gradients(CachedGradients(cached), samples) if self.over_gradients else None,
        )

    def variants(self, upstream: str | None = None) -> list[Variant]:
        """All of the plan, or those of one upstream."""
        asked = _asked(json.dumps(self.plan))[1]
        found = {name: Mixture.of(weights) for name, weights in self.mixtures.items()}
        known = [v.with_mixture(found[v.name]) if v.name in found else v for v in asked]
        return [variant for variant in known if upstream in (None, variant.upstream)]

    def variants_to_make(self, upstream: str | None = None) -> list[Variant]:
        return [v for v in self.variants(upstream) if self.to_make is None or v.name in self.to_make]


@functools.lru_cache(maxsize=4)
def _asked(plan: str) -> tuple[CompressionPlan, tuple[Variant, ...]]:
    """A plan and its variants, from the JSON that every ticket of a run repeats: corpora stay in their order."""
    parsed = parse_plan(json.loads(plan))
    return parsed, tuple(variants(parsed))


@functools.lru_cache(maxsize=2)
def _opened(folder: Path, revision: str | None, stamps: tuple[tuple[str, int, int], ...]) -> ModelSource:
    """A model by what its folder shows without reading it; with it the digest and the headers of its files are kept."""
    return ModelSource.open(folder, revision)


@functools.lru_cache(maxsize=2)
def _from_hub(name: str, revision: str | None, model: str) -> Path:
    """Where a hub's model lies on this machine; asked once for each digest, for what a name means may change."""
    return ModelSource.open(name, revision).path


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    for file in sorted(folder.iterdir()):
        if file.is_file():
            yield file.name, file.stat().st_size, file.stat().st_mtime_ns


def resolve_device(wanted: str) -> str:
    """`auto` is a GPU where there is one. Raises `UsageError` for a device that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if gpus else "cpu"
    if wanted == "cpu":
        return wanted
    named = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if named is None:
        do = "Use `cpu`, `cuda`, `cuda:1` or `auto`."
        raise UsageError("not a device", where="execution.device", got=wanted, do=do)
    if int(named[1] or 0) >= gpus:
        what = f"torch sees {gpus} GPU(s), counted from 0" if gpus else "no GPU is visible to torch"
        raise UsageError(what, where="execution.device", got=wanted, do="Use `cpu` or `auto`.")
    return wanted


@contextmanager
def task_report() -> Iterator[Report]:
    """Progress of a task: log lines and an artifact in a Prefect run, a bar or log lines otherwise."""
    if TaskRunContext.get() is not None:
        with progress_shown() as shown, logged(get_run_logger().info) as lines:
            yield each(lines, shown)
    else:
        with reporting() as report:
            yield report
