"""The run spec that tasks pass on: a small JSON description of a run, from which each rebuilds its stage's inputs."""

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
from crosscal.stages.compress import RunContext
from crosscal.stages.gradients import CachedGradients, Gradients
from crosscal.stages.moments import DENSE, CachedMoments
from crosscal.stages.sample import Sample
from crosscal.statistics import EVERY, Mixture, Statistic
from crosscal.store import Store
from crosscal.tasks.artifacts import progress_shown
from crosscal.variants import GENERAL, Variant, variants

SEEN_BY_ALL = "Every worker must see the same model: a hub id, or a folder of a shared disk."


@dataclass(frozen=True)
class RunSpec:
    """One run as far as it is known: plan and locations first, then the model, then the samples."""

    plan: dict[str, Any]
    home: str
    model: str = ""
    """Digest of the model."""
    device: str = ""
    dtype: str = ""
    """Dtype of the activations."""
    only: list[str] | None = None
    """Names of the variants of this run; None: all of its plan."""
    versions: dict[str, int] = field(default_factory=dict)
    """Corpus name in the store → the version this run uses, even if others land meanwhile."""
    run_dir: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    to_make: list[str] | None = None
    """Names of the variants whose models are needed (see `race.models_to_make`); None, all, before that is known."""
    mixtures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Variant → the mixture weights that were found, where the plan leaves them open."""

    @property
    def parsed(self) -> CompressionPlan:
        return _asked(json.dumps(self.plan))[0]

    @property
    def store(self) -> Store:
        return Store(self.home)

    @property
    def cached(self) -> CachedMoments:
        """The dense model's moments in the store: the one-stream statistics of all the plan's variants.

        All of them, so that the parts of a study share one calibration pass.
        """
        wanted = statistics_needed(_asked(json.dumps(self.plan))[1]) & EVERY
        if self.parsed.evaluate.screen:
            wanted |= {Statistic.GRAM}  # needed to measure losses
        return CachedMoments(self.store, self.model, DENSE, self.dtype, wanted=wanted)

    def source(self) -> ModelSource:
        """Return the run's model, opened once per process as long as its files are unchanged.

        Raises `ModelError` when it does not exist, or when its files are not those that the run began with.
        """
        plan = self.parsed
        folder = Path(plan.model).expanduser()
        if not folder.is_dir():
            folder = _from_hub(plan.model, plan.revision, self.model)
        source = _opened(folder, plan.revision, tuple(_stamps(folder)))
        if self.model and source.digest != self.model:
            raise ModelError(
                "the model's files differ from those the run began with",
                where=f"{platform.node()}, {plan.model}",
                do=f"Do not change a model's files while a run uses them. {SEEN_BY_ALL}",
            )
        return source

    @property
    def sampled(self) -> list[Sample]:
        return [Sample.from_json(sample) for sample in self.samples]

    @property
    def has_workers(self) -> bool:
        """Whether other processes, perhaps on other machines, run calibration passes and solves, sharing the store."""
        return self.parsed.execution.runner == "dask"

    def source_on_worker(self) -> ModelSource:
        """Return the model as this machine sees it. Raises `ModelError` when it does not exist, or is not the run's."""
        try:
            source = self.source()
        except ModelError as error:
            where = f"{platform.node()}, {self.parsed.model}"
            raise ModelError(error.what, where=where, got=error.got, do=SEEN_BY_ALL) from error
        resolve_device(self.device)
        return source

    @property
    def reference(self) -> Mixture:
        """The mixture on which losses of methods without calibration data are measured."""
        corpora = [sample["corpus"] for sample in self.samples] or list(self.parsed.corpora)
        return Mixture.of({GENERAL if GENERAL in corpora else corpora[0]: 1.0})

    @property
    def over_gradients(self) -> set[tuple[str, int]]:
        """The (corpus, seed) pairs over which some step needs the loss's gradients."""
        return gradients_needed(self.variants(), self.reference)

    def run_context(self) -> RunContext:
        """Return the context of the compression stages: folder, model, moments, samples, gradients."""
        samples = {(sample.corpus, sample.seed): sample for sample in self.sampled}
        cached = self.cached
        return RunContext(
            folder=Path(self.run_dir),
            source=self.source(),
            cached=cached,
            samples=samples,
            reference=self.reference,
            device=self.device,
            gradients=Gradients(CachedGradients(cached), samples) if self.over_gradients else None,
            measured_on=self._sampled_in_every_draw if self.parsed.evaluate.screen else (),
        )

    @property
    def _sampled_in_every_draw(self) -> tuple[str, ...]:
        sampled = {(sample["corpus"], sample["seed"]) for sample in self.samples}
        seeds = {seed for _, seed in sampled}
        return tuple(name for name in self.parsed.corpora if all((name, seed) in sampled for seed in seeds))

    def variants(self, upstream: str | None = None) -> list[Variant]:
        """Return all variants of this run, or those of one upstream, with the mixtures found so far."""
        asked = [v for v in _asked(json.dumps(self.plan))[1] if self.only is None or v.name in self.only]
        found = {name: Mixture.of(weights) for name, weights in self.mixtures.items()}
        known = [v.with_mixture(found[v.name]) if v.name in found else v for v in asked]
        return [variant for variant in known if upstream in (None, variant.upstream)]

    def variants_to_make(self, upstream: str | None = None) -> list[Variant]:
        return [v for v in self.variants(upstream) if self.to_make is None or v.name in self.to_make]


@functools.lru_cache(maxsize=4)
def _asked(plan: str) -> tuple[CompressionPlan, tuple[Variant, ...]]:
    """Parse a plan and its variants, from the JSON that every spec of a run repeats; corpora keep their order."""
    parsed = parse_plan(json.loads(plan))
    return parsed, tuple(variants(parsed))


@functools.lru_cache(maxsize=2)
def _opened(folder: Path, revision: str | None, stamps: tuple[tuple[str, int, int], ...]) -> ModelSource:
    """Open a model, cached by names, sizes and times in its folder, together with its files' digest and headers."""
    return ModelSource.open(folder, revision)


@functools.lru_cache(maxsize=2)
def _from_hub(name: str, revision: str | None, model: str) -> Path:
    """Return a hub model's local folder, cached per digest, since the content behind a name may change."""
    return ModelSource.open(name, revision).path


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    for file in sorted(folder.iterdir()):
        if file.is_file():
            yield file.name, file.stat().st_size, file.stat().st_mtime_ns


def resolve_device(wanted: str) -> str:
    """Return the device to use: `auto` is a GPU if there is one. Raises `UsageError` for a missing device."""
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
    """Yield a progress report of a task: log lines and an artifact in a Prefect run, a bar or log lines otherwise."""
    if TaskRunContext.get() is not None:
        with progress_shown() as shown, logged(get_run_logger().info) as lines:
            yield each(lines, shown)
    else:
        with reporting() as report:
            yield report
