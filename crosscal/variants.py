"""From a plan to the list of models it asks for, each named once.

Entries whose result cannot differ are one variant: a mixture of weight 1 on the general corpus is the same for
every domain, and methods that need no data ignore mixture, seed and upstream.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crosscal.compressors import COMPRESSORS, DATA_FREE, Compressor, Sparsity
from crosscal.errors import PlanError, UsageError
from crosscal.plan import Compress, CompressionPlan
from crosscal.statistics import Mixture
from crosscal.store.keys import digest_of

GENERAL = "general"
KEEP_DENSE = "keep-dense"
"""The fallback a plan may name: a matrix that cannot be solved stays as it is, and the report lists it."""


@dataclass(frozen=True)
class Variant:
    """One compressed model: a method with its settings, on one mixture of corpora, for one draw of windows."""

    name: str
    method: str
    settings: tuple[tuple[str, Any], ...]
    mixture: Mixture | None
    """None for a method that needs no data."""
    upstream: str
    seed: int
    trace_normalised: bool
    fallback: str | None = None
    """What the plan allows for matrices that cannot be solved; None stops the run."""

    @property
    def compressor(self) -> Compressor:
        return COMPRESSORS[self.method](**dict(self.settings))

    @property
    def setting(self) -> dict[str, Any]:
        return dict(self.settings)

    @property
    def key(self) -> str:
        """Digest of everything about the variant but its name."""
        mixture = self.mixture.as_dict() if self.mixture else None
        normalised = self.trace_normalised and "corpora"  # what has one trace: sets had it in earlier versions
        parts = [self.method, self.settings, mixture, self.upstream, self.seed, normalised, self.fallback]
        return digest_of(parts)


def variants(plan: CompressionPlan) -> list[Variant]:
    """Every variant of a plan, in the plan's order, duplicates left out. Raises `PlanError`, `UsageError`."""
    found: dict[str, Variant] = {}
    for index, entry in enumerate(plan.compress):
        for variant in _expand(plan, entry, f"compress.{index}"):
            found.setdefault(variant.key, variant)
    names: dict[str, int] = {}
    for variant in found.values():
        names[variant.name] = names.get(variant.name, 0) + 1
    return [
        variant if names[variant.name] == 1 else dataclasses.replace(variant, name=f"{variant.name}-{variant.key[:6]}")
        for variant in found.values()
    ]


def samples_needed(plan: CompressionPlan) -> list[tuple[str, int]]:
    """The (corpus, seed) pairs that some variant's mixture uses; methods that need no data have their loss measured on
    the general corpus, or else the first."""
    found = variants(plan)
    used = {(name, variant.seed) for variant in found if variant.mixture for name in variant.mixture.corpora}
    reference = GENERAL if GENERAL in plan.corpora else next(iter(plan.corpora))
    used |= {(reference, variant.seed) for variant in found if variant.mixture is None}
    return [(name, seed) for seed in plan.seeds for name in plan.corpora if (name, seed) in used]


def _expand(plan: CompressionPlan, entry: Compress, where: str) -> Iterator[Variant]:
    for method in entry.method:
        if method not in COMPRESSORS:
            raise PlanError(
                "unknown method", where=f"{where}.method", got=method, do=f"Methods: {', '.join(COMPRESSORS)}."
            )
        data_free = method in DATA_FREE
        with _said_of(where):
            mixtures = [None] if data_free else list(_mixtures(plan, entry, where))
            settings_list = list(_settings(entry, method, where))
        upstreams = ["dense"] if data_free else entry.upstream
        seeds = plan.seeds[:1] if data_free else plan.seeds
        for settings, mixture, upstream, seed in itertools.product(settings_list, mixtures, upstreams, seeds):
            name = _name(method, settings, mixture, upstream, entry.trace_normalised)
            name += f"-s{seed}" if len(plan.seeds) > 1 and not data_free else ""
            normalised = entry.trace_normalised and not data_free
            yield Variant(name, method, settings, mixture, upstream, seed, normalised, entry.fallback)


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """A setting that a method or a mixture refuses is said of its place in the plan."""
    try:
        yield
    except PlanError:
        raise
    except UsageError as error:
        raise PlanError(error.what, where=where, got=error.got, do=error.do) from error


def _settings(entry: Compress, method: str, where: str) -> Iterator[tuple[tuple[str, Any], ...]]:
    """The product of the entry's axes that this method has."""
    fields = {field.name: field for field in dataclasses.fields(COMPRESSORS[method])}
    for name in ("sparsity", "bits"):
        if getattr(entry, name) is None and name in fields:
            raise PlanError(
                f"{method} needs `{name}`", where=where, do=f"Add `{name}: {'0.5' if name == 'sparsity' else '4'}`."
            )
        if getattr(entry, name) is not None and name not in fields and len(entry.method) == 1:
            raise PlanError(f"{method} has no `{name}`", where=where, do="Remove it, or choose another method.")
    axes = [[(name, value) for value in getattr(entry, name)] for name in fields]
    for combination in itertools.product(*axes):
        COMPRESSORS[method](**dict(combination))  # the settings' own checks speak now, not hours later
        yield tuple((name, _plain(name, value)) for name, value in combination)


def _plain(name: str, value: Any) -> Any:
    """Settings as JSON: a sparsity is its fraction, or its "n:m"."""
    if name != "sparsity":
        return value
    sparsity = Sparsity.parse(value)
    return str(sparsity) if sparsity.group else sparsity.fraction


def _mixtures(plan: CompressionPlan, entry: Compress, where: str) -> Iterator[Mixture]:
    if entry.mixture is not None:
        yield from (Mixture.of(weights) for weights in entry.mixture)
        return
    if entry.domain is None:
        only = GENERAL if GENERAL in plan.corpora else next(iter(plan.corpora)) if len(plan.corpora) == 1 else None
        if only is None:
            raise PlanError(
                "which corpus to calibrate on?", where=where, do="Add `domain` and `alpha`, or a `mixture`."
            )
        yield Mixture.of({only: 1.0})
        return
    for domain, alpha in itertools.product(entry.domain, entry.alpha):
        if alpha < 1 and GENERAL not in plan.corpora:
            raise PlanError(
                "alpha below 1 needs a corpus named `general`",
                where=where,
                got=f"alpha {alpha:g}",
                do="Add it, or set alpha: 1, or give a `mixture`.",
            )
        yield Mixture.alpha(domain, alpha, GENERAL)


def _name(
    method: str, settings: tuple[tuple[str, Any], ...], mixture: Mixture | None, upstream: str, trace_normalised: bool
) -> str:
    parts = [method]
    values = dict(settings)
    defaults = {f.name: f.default for f in dataclasses.fields(COMPRESSORS[method])}
    if "sparsity" in values:
        sparsity = Sparsity.parse(values["sparsity"])
        parts.append(f"{sparsity.kept}of{sparsity.group}" if sparsity.group else f"{sparsity.fraction * 100:g}")
    if "bits" in values:
        parts.append(f"w{values['bits']}" + (f"g{values['group_size']}" if values["group_size"] else ""))
    for name, value in settings:
        if name not in ("sparsity", "bits", "group_size") and value != defaults[name]:
            parts.append(f"{name.replace('_', '')}{'' if value is True else f'{value:g}'}")
    if mixture is not None:
        parts.append(_mixture_name(mixture))
    if upstream != "dense":
        parts.append(upstream)
    if trace_normalised:
        parts.append("tracenorm")
    return "-".join(parts)


def _mixture_name(mixture: Mixture) -> str:
    if len(mixture.weights) == 1:
        return mixture.corpora[0]
    if len(mixture.weights) == 2 and GENERAL in mixture.corpora:
        domain = next(name for name in mixture.corpora if name != GENERAL)
        return f"{domain}-a{mixture.as_dict()[domain]:g}"
    return "-".join(f"{name}{weight:g}" for name, weight in mixture.weights)
