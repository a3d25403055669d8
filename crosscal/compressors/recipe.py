"""Recipes: steps in order, and many recipes at once over one site.

A method is a step, a frozen dataclass of its settings that is called with a state and returns the next one:

    kind      transform, prune, quantize, refine, repair or allocate (see `allocation`, which such a step has instead
              of being called)
    needs     the statistics that it reads; it is shown no other
    version   part of every key: a change of what the step computes bumps it
    __call__  Site -> Site, pure

A step may also be stacked: with a `stack_key` and a static `many(site, steps) -> [Site]`, steps of one class and key
that start from one state are solved together, with the same results as one by one. One that leaves a low-rank part says
`has_low_rank`, one that corrects biases `changes_bias`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from crosscal.compressors.allocation import ALLOCATE, SparsitiesOf, sparsities_over, with_sparsities
from crosscal.compressors.grid import check_grid
from crosscal.compressors.problem import LayerProblem, LayerSolution, solved
from crosscal.compressors.state import Dense, Layer, Site, Statistic, Statistics
from crosscal.errors import StatisticsError, UsageError

Kind = Literal["transform", "prune", "quantize", "refine", "repair", "allocate"]


class Step(Protocol):
    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Statistic]]
    version: ClassVar[int]

    def __call__(self, site: Site) -> Site: ...


@dataclass(frozen=True)
class Placed:
    """A step of a recipe and whose statistics it sees: None, the recipe's own mixture; else that of another one."""

    step: Any
    mixture: Hashable = None


Recipe = tuple[Placed, ...]
StatisticsOf = Callable[[Any], Statistics]
"""Of a mixture that a step has for itself."""


def any_step(recipe: Recipe, trait: str) -> bool:
    """Whether one of the steps says this of itself: `has_low_rank`, `changes_bias`."""
    return any(getattr(placed.step, trait, False) for placed in recipe)


def check_inputs(step: Any, inputs: int, name: str) -> None:
    """Whether a step can work on a layer of so many inputs. Raises `UsageError`: groups must divide them."""
    if (sparsity := getattr(step, "sparsity", None)) is not None:
        sparsity.check(inputs, name)
    if hasattr(step, "group_size"):
        check_grid(step.group_size, inputs, name)


def group_misfit(recipe: Sequence[Placed], inputs: int) -> str:
    """Which group size of a recipe's steps does not divide a matrix's inputs; empty where all do."""
    sizes = (size for placed in recipe if (size := getattr(placed.step, "group_size", None)) is not None)
    return next((f"group_size {size} does not divide its {inputs} inputs" for size in sizes if inputs % size), "")


def check_order(recipe: Sequence[tuple[str, Any]]) -> None:
    """Of the steps of a recipe with their methods' names. Raises `UsageError` for scales behind integers, which share
    theirs over inputs."""
    kinds = [step.kind for _, step in recipe]
    if "quantize" in kinds and "transform" in kinds[kinds.index("quantize") :]:
        what = "a rounded matrix cannot be scaled any more"
        raise UsageError(what, got=" + ".join(method for method, _ in recipe), do="Scale first, then round.")


def run(site: Site, steps: Sequence[Any]) -> Site:
    """The site after all steps, in order. An allocator takes this site for the whole model."""
    recipe = tuple(Placed(step) for step in steps)
    allocator = next((step for step in steps if step.kind == ALLOCATE), None)
    if allocator is not None:
        recipe = allotted(recipe, sparsities_over(allocator, [[site]]), [layer.name for layer in site.layers])
    return solve(site, [recipe])[0]


def allotted(recipe: Recipe, sparsities_of: SparsitiesOf, layers: Sequence[str]) -> Recipe:
    """A recipe without its allocator, for these layers of one site: its steps with the sparsities allotted to them.

    What is allotted is a setting like any other, so that recipes are shared and stacked as without an allocator.
    """
    steps = (placed for placed in recipe if placed.step.kind != ALLOCATE)
    return tuple(dataclasses.replace(each, step=with_sparsities(each.step, sparsities_of, layers)) for each in steps)


def solve(site: Site, recipes: Sequence[Recipe], statistics_of: StatisticsOf | None = None) -> list[Site]:
    """The site after each recipe. What recipes begin with in common is solved once; steps that start from one state
    and can be stacked are solved together."""
    done: dict[int, Site] = {index: site for index, recipe in enumerate(recipes) if not recipe}
    branches: dict[Placed, list[int]] = {}
    for index, recipe in enumerate(recipes):
        if recipe:
            branches.setdefault(recipe[0], []).append(index)
    for stack in _stacks(branches):
        for first, state in zip(stack, _applied(site, stack, statistics_of), strict=True):
            members = branches[first]
            done.update(zip(members, solve(state, [recipes[i][1:] for i in members], statistics_of), strict=True))
    return [done[index] for index in range(len(recipes))]


def _stacks(branches: Mapping[Placed, list[int]]) -> list[list[Placed]]:
    stacks: dict[Hashable, list[Placed]] = {}
    for number, placed in enumerate(branches):
        key = getattr(placed.step, "stack_key", None)
        stacks.setdefault(number if key is None else (type(placed.step).many, placed.mixture, key), []).append(placed)
    return list(stacks.values())


def _applied(site: Site, stack: Sequence[Placed], statistics_of: StatisticsOf | None) -> list[Site]:
    """One state after each step of a stack; statistics are cut to what the steps declare, and move with the inputs."""
    own, mixture = site.statistics, stack[0].mixture
    if mixture is not None:
        assert statistics_of is not None, "a step with a mixture of its own needs somebody who knows it"
        own = statistics_of(mixture)
        own = own if site.scale_I is None else own.scaled(site.scale_I)
    steps = [placed.step for placed in stack]
    seen = dataclasses.replace(site, statistics=own.only(steps[0].needs))
    after = type(steps[0]).many(seen, steps) if len(steps) > 1 else [steps[0](seen)]
    return [dataclasses.replace(state, statistics=_moved(site, state)) for state in after]


def _moved(before: Site, after: Site) -> Statistics:
    if after.scale_I is before.scale_I or after.scale_I is None:
        return before.statistics
    return before.statistics.scaled(after.scale_I if before.scale_I is None else after.scale_I / before.scale_I)


def site_of(
    problems: Sequence[LayerProblem],
    statistics: Statistics | None = None,
    storable_I: Callable[[Tensor], Tensor] | None = None,
) -> Site:
    """Layer problems that share one Hessian as a site, by default with the statistics of the first, and with nothing
    that absorbs scales. A factor that they bring is used again."""
    first = problems[0]
    if any(problem.hessian_II is not first.hessian_II for problem in problems):
        raise StatisticsError("layers solved together must share a Hessian", where=first.name)
    if statistics is None:
        hessian_II = first.hessian_II
        own = {} if hessian_II is None else {Statistic.GRAM: hessian_II, Statistic.SQUARE_SUM: hessian_II.diagonal()}
        statistics = Statistics({**own, **first.further}, first.name)
    if first.shared_factor is not None:
        statistics.know(first.shared_factor)
    layers = [Layer(p.name, p.weight_OI, Dense(p.weight_OI), stored_dtype=p.stored_dtype) for p in problems]
    return Site(first.name, tuple(layers), statistics, storable_I=storable_I)


def alone(step: Any, problem: LayerProblem) -> LayerSolution:
    """One step on one layer: `COMPRESSORS[name](...).compress(problem)`."""
    site = run(site_of([problem]), [step])
    return solved(problem, site.layers[0], site.scale_I)


def solve_many(problems: Sequence[LayerProblem], steps: Sequence[Any]) -> list[list[LayerSolution]]:
    """Solutions [step][problem] for layers that share one Hessian; the same as calling `compress` on each."""
    if not problems:
        return [[] for _ in steps]
    sites = solve(site_of(problems), [(Placed(step),) for step in steps])
    return [solutions(problems, site) for site in sites]


def solutions(problems: Sequence[LayerProblem], site: Site) -> list[LayerSolution]:
    """The answers to layer problems that a recipe left in their site."""
    return [solved(problem, layer, site.scale_I) for problem, layer in zip(problems, site.layers, strict=True)]
