"""Expand a plan into its variants: the compressed models that it asks for, each listed once.

Entries with identical results become one variant: a mixture of weight 1 on the general corpus is the same for every
domain, and recipes that need no data ignore mixture, seed and upstream.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crosscal.compressors import ALLOCATE, COMPRESSORS, Amount, Placed, Sparsity, amounts_of, grid_of, takes_two_streams
from crosscal.compressors.allocation import check_allocator
from crosscal.compressors.recipe import check_order
from crosscal.errors import PlanError, UsageError
from crosscal.mixtures import GENERAL, Asked, Search, asked_mixtures, mixture_name, own_mixtures
from crosscal.plan import Compress, CompressionPlan
from crosscal.plan.settings import OF_A_MIXTURE, Settings, combinations, default_of, example_of, needed
from crosscal.statistics import Mixture
from crosscal.store.keys import digest_of

KEEP_DENSE = "keep-dense"
"""The fallback that a plan may name: a matrix that cannot be solved stays dense, and the report lists it."""
BEGIN = ("correct", "transform", "prune", "quantize")
"""Kinds of steps that a recipe may begin with; the others refine or repair an earlier step."""


@dataclass(frozen=True)
class RecipeStep:
    """A method with its settings and, optionally, a mixture of its own that replaces the recipe's."""

    method: str
    settings: Settings
    mixture: Mixture | None = None

    @property
    def step(self) -> Any:
        """An instance of the method's dataclass with these settings."""
        return COMPRESSORS[self.method](**dict(self.settings))

    @property
    def key(self) -> list[Any]:
        mixture = self.mixture.as_dict() if self.mixture else None
        return [self.method, COMPRESSORS[self.method].version, self.settings, mixture]


@dataclass(frozen=True)
class Variant:
    """One compressed model: a recipe on one mixture of corpora, for one draw of calibration windows."""

    name: str
    recipe: tuple[RecipeStep, ...]
    mixture: Mixture | None
    """None for a recipe that needs no data. Until a search is over, its starting mixture."""
    upstream: str
    seed: int
    trace_normalised: bool
    fallback: str | None = None
    """What happens to matrices that cannot be solved; None stops the run."""
    leave_dense: tuple[str, ...] = ()
    """Name patterns of matrices that stay dense."""
    search: Search | None = None
    """The search for the mixture; None once it is found, or if the plan gives the mixture."""
    found_by: str | None = None
    """Description of the search that found the mixture."""

    @property
    def method(self) -> str:
        """The method names in order: "sparsegpt+refit"."""
        return "+".join(step.method for step in self.recipe)

    @property
    def steps(self) -> tuple[Placed, ...]:
        return tuple(Placed(step.step, step.mixture) for step in self.recipe)

    @property
    def allocator(self) -> RecipeStep | None:
        """The step that decides how much the other steps remove from each layer of the model, if there is one."""
        return next((step for step in self.recipe if COMPRESSORS[step.method].kind == ALLOCATE), None)

    @property
    def setting(self) -> dict[str, Any]:
        """All settings; a name that an earlier step also uses is prefixed with its method: `refit.iterations`."""
        found: dict[str, Any] = {}
        for step in self.recipe:
            for name, value in step.settings:
                found[f"{step.method}.{name}" if name in found else name] = value
            if step.mixture is not None:
                found[f"{step.method}.mixture"] = step.mixture.as_dict()
        return found

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """The amounts of compression of all steps, in order."""
        return tuple(amount for step in self.recipe for amount in amounts_of(step.step))

    @property
    def grid(self) -> tuple[int, int | None] | None:
        """(bits, inputs per scale) of the stored integers; None if no step quantizes."""
        return grid_of([step.step for step in self.recipe])

    def mixtures(self, reference: Mixture) -> list[Mixture]:
        """Return the recipe's mixture (`reference` for a recipe without data) and its steps' own mixtures."""
        return [self.mixture or reference, *(step.mixture for step in self.recipe if step.mixture)]

    def with_mixture(self, mixture: Mixture) -> Variant:
        """Return the variant with the mixture that was found, equal to that of a plan with these weights."""
        found_by = self.search.text if self.search else self.found_by
        return dataclasses.replace(self, mixture=mixture, search=None, found_by=found_by)

    @property
    def key(self) -> str:
        """Digest of everything that determines the model: the steps with their versions, the mixture or search, …"""
        mixture, chain = self.mixture.as_dict() if self.mixture else None, [step.key for step in self.recipe]
        mixture = self.search.key if self.search else mixture
        normalised = self.trace_normalised and "corpora"  # scaled to one trace; earlier: each set
        left = filter(None, [sorted(self.leave_dense)])
        return digest_of([chain, mixture, self.upstream, self.seed, normalised, self.fallback, *left])


def variants(plan: CompressionPlan) -> list[Variant]:
    """Return every variant of a plan in order, without duplicates. Raises `PlanError`, `UsageError`."""
    found: dict[str, Variant] = {}
    for index, entry in enumerate(plan.compress):
        for variant in _expand(plan, entry, f"compress.{index}"):
            found.setdefault(variant.key, variant)
    names = Counter(variant.name for variant in found.values())
    return [variant if names[variant.name] == 1 else _with_key(variant) for variant in found.values()]


def samples_needed(plan: CompressionPlan, found: Sequence[Variant] | None = None) -> list[tuple[str, int]]:
    """Return the (corpus, seed) pairs that the mixtures of `found` (default: of all variants) use. The loss of recipes
    that need no data is measured on the general corpus, or else the first."""
    found = variants(plan) if found is None else found
    reference = Mixture.of({GENERAL if GENERAL in plan.corpora else next(iter(plan.corpora)): 1.0})
    used = {(name, v.seed) for v in found for mixture in v.mixtures(reference) for name in mixture.corpora}
    return [(name, seed) for seed in plan.seeds for name in plan.corpora if (name, seed) in used]


def _expand(plan: CompressionPlan, entry: Compress, where: str) -> Iterator[Variant]:
    parts = entry.steps or [{"method": entry.method, **(entry.model_extra or {})}]
    with _error_context(where):
        contexts = list(asked_mixtures(plan, entry.model_dump(), where))
    recipes = [list(_recipes(plan, parts, domain, where, has_steps=entry.steps is not None)) for domain, _ in contexts]
    for same in zip(*recipes, strict=True):  # one setting on all mixtures before the next setting
        for recipe, (_, mixture) in zip(same, contexts, strict=True):
            yield from _of_recipe(plan, entry, recipe, mixture, where)


def _recipes(
    plan: CompressionPlan, parts: Sequence[Mapping[str, Any]], domain: str | None, where: str, *, has_steps: bool
) -> Iterator[tuple[RecipeStep, ...]]:
    """Yield the product of the options of all steps."""
    places = [f"{where}.steps.{number}" if has_steps else where for number in range(len(parts))]
    options = [list(_options(plan, part, domain, place)) for part, place in zip(parts, places, strict=True)]
    for recipe in itertools.product(*options):
        _check_recipe(recipe, where)
        yield recipe


def _of_recipe(
    plan: CompressionPlan, entry: Compress, recipe: tuple[RecipeStep, ...], asked: Asked, where: str
) -> Iterator[Variant]:
    if "dense" in entry.upstream and takes_two_streams(step.step for step in recipe):
        pairing = next(step.method for step in recipe if takes_two_streams([step.step]))
        raise PlanError(
            f"{pairing} corrects errors of compressed blocks, and a dense upstream has none",
            where=where,
            got=f"upstream {', '.join(entry.upstream)}",
            do="Set `upstream: sequential`.",
        )
    data_free = not any(COMPRESSORS[step.method].needs for step in recipe)
    upstreams = ["dense"] if data_free else entry.upstream
    seeds = plan.seeds[:1] if data_free else plan.seeds
    seen = None if data_free else asked
    search = seen if isinstance(seen, Search) else None
    if search and "sequential" in upstreams:
        raise PlanError(
            "`auto` compares layer losses on the dense model's inputs, and a sequential upstream has other inputs",
            where=where,
            got=f"upstream {', '.join(upstreams)}",
            do="Find the mixture with `upstream: dense`, and give its weights to a sequential entry.",
        )
    mixture = seen.start if isinstance(seen, Search) else seen
    mixed = [one for one in (mixture, *(step.mixture for step in recipe)) if one and len(one.corpora) > 1]
    normalised = entry.trace_normalised and not data_free and bool(mixed)  # one corpus alone has nothing to scale
    for upstream, seed in itertools.product(upstreams, seeds):
        name = _name(recipe, seen, upstream, normalised)
        name += f"-s{seed}" if len(plan.seeds) > 1 and not data_free else ""
        leave_dense = tuple(plan.leave_dense)
        yield Variant(name, recipe, mixture, upstream, seed, normalised, entry.fallback, leave_dense, search)


def _with_key(variant: Variant) -> Variant:
    """Return the variant with a part of its key in its name: before the draw, if named, and the same for all draws."""
    draw = f"-s{variant.seed}"
    if not variant.name.endswith(draw):
        return dataclasses.replace(variant, name=f"{variant.name}-{variant.key[:6]}")
    key = dataclasses.replace(variant, seed=0).key
    return dataclasses.replace(variant, name=f"{variant.name.removesuffix(draw)}-{key[:6]}{draw}")


def _options(plan: CompressionPlan, part: Mapping[str, Any], domain: str | None, where: str) -> Iterator[RecipeStep]:
    """Yield every option of one step of a sweep."""
    axes = {name: values for name, values in part.items() if name not in ("method", *OF_A_MIXTURE)}
    for method in part["method"]:
        if method not in COMPRESSORS:
            raise PlanError(
                "unknown method", where=f"{where}.method", got=method, do=f"Methods: {', '.join(COMPRESSORS)}."
            )
        missing = [name for name in needed(method) if name not in axes]
        if missing:
            example = f"{missing[0]}: {example_of(method, missing[0])}"
            raise PlanError(f"{method} needs `{missing[0]}`", where=where, do=f"Add `{example}`.")
        with _error_context(where):
            mixtures = list(own_mixtures(plan, part, domain, where))
            settings_list = list(combinations(method, axes))
            for settings in settings_list:
                COMPRESSORS[method](**dict(settings))  # runs the settings' own checks now, not hours later
        for settings, mixture in itertools.product(settings_list, mixtures):
            yield RecipeStep(method, tuple((name, _plain(value)) for name, value in settings), mixture)


def _check_recipe(recipe: Sequence[RecipeStep], where: str) -> None:
    """Raise `PlanError` for a wrong order of steps, or a first step that has nothing to work on."""
    with _error_context(where):
        check_allocator([(step.method, step.step) for step in recipe])
        check_order([(step.method, step.step) for step in recipe])
    first = next(step.method for step in recipe if COMPRESSORS[step.method].kind != ALLOCATE)
    if COMPRESSORS[first].kind not in BEGIN:
        raise PlanError(
            f"{first} refines the result of an earlier step",
            where=where,
            got="it comes first",
            do=f"Put it behind one in `steps`: [{{method: sparsegpt, sparsity: 0.5}}, {{method: {first}, …}}].",
        )


@contextmanager
def _error_context(where: str) -> Iterator[None]:
    """Re-raise the error of a refused setting or mixture with its location in the plan."""
    try:
        yield
    except PlanError:
        raise
    except UsageError as error:
        raise PlanError(error.what, where=where, got=error.got, do=error.do) from error


def _plain(value: Any) -> Any:
    """Return a sparsity of the form "n:m" as its canonical text, any other value unchanged."""
    return str(Sparsity.parse(value)) if isinstance(value, str) and ":" in value else value


def _name(recipe: Sequence[RecipeStep], mixture: Asked | None, upstream: str, trace_normalised: bool) -> str:
    parts = [part for step in recipe for part in _step_name(step)]
    if mixture is not None:
        parts.append(mixture_name(mixture))
    if upstream != "dense":
        parts.append(upstream)
    if trace_normalised:
        parts.append("tracenorm")
    return "-".join(parts)


def _step_name(step: RecipeStep) -> Iterator[str]:
    """Yield the method, the amounts that it removes or keeps, and every setting that is not the default."""
    yield step.method
    amounts = amounts_of(step.step)
    yield from (amount.label for amount in amounts)
    said = {name for amount in amounts for name in amount.said_by}
    for name, value in step.settings:
        if name not in said and value != default_of(step.method, name):
            text = f"{value:g}" if isinstance(value, float) else str(value).lower()
            yield name.replace("_", "") + ("" if value is True else text)
    if step.mixture is not None:
        yield f"on-{mixture_name(step.mixture)}"
