"""Recipes: ordered steps, and the solution of many recipes at once over one site.

A method is a step, a frozen dataclass of its settings that is called with a state and returns the next one:

    kind      correct, transform, prune, quantize, refine, repair or allocate (which has the methods of an `Allocator`
              in `allocation` instead of `__call__`)
    needs     the statistics that it reads; it has access to no others
    version   part of every key; increase it when the step's results change
    __call__  Site -> Site, pure

A step may support stacking: with a `stack_key` and a static `many(site, steps) -> [Site]`, steps of one class and key
that start from one state are solved together, with the same results as one by one. A step that leaves a low-rank part
sets `has_low_rank`; one that corrects biases sets `changes_bias`; one that returns removed weights sets
`changes_mask` and has a `group`, the inputs among which it exchanges them (None: all).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from crosscal.compressors.allocation import ALLOCATE, SparsitiesOf, sparsities_over, with_sparsities
from crosscal.compressors.grid import check_grid
from crosscal.compressors.problem import LayerProblem, LayerSolution, solved
from crosscal.compressors.state import Dense, Layer, Need, Site, Statistic, Statistics
from crosscal.errors import StatisticsError, UsageError
from crosscal.statistics.gradients import Gradient
from crosscal.statistics.statistic import streams_of

Kind = Literal["correct", "transform", "prune", "quantize", "refine", "repair", "allocate"]


class Step(Protocol):
    """A method with its settings (see the module docstring)."""

    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Need]]
    version: ClassVar[int]

    def __call__(self, site: Site) -> Site: ...


@dataclass(frozen=True)
class Placed:
    """A step of a recipe and the mixture of its statistics; None means the recipe's own mixture."""

    step: Any
    mixture: Hashable = None


Recipe = tuple[Placed, ...]
StatisticsOf = Callable[[Any], Statistics]
"""Returns the statistics of a step's own mixture."""


def any_step(recipe: Recipe, trait: str) -> bool:
    """True if any step has this trait: `has_low_rank`, `changes_bias`."""
    return any(getattr(placed.step, trait, False) for placed in recipe)


def takes_two_streams(steps: Iterable[Any]) -> bool:
    """True if any step needs the dense model's inputs in addition to those behind compressed blocks."""
    return any(streams_of(step.needs) > 1 for step in steps)


def check_inputs(step: Any, inputs: int, name: str) -> None:
    """Raise `UsageError` if a step's groups do not divide a layer's number of inputs."""
    if _changes_mask(step) and inputs % (step.group or 1):
        got = f"group {step.group}, {inputs} inputs"
        raise UsageError("`group` must divide the layer's inputs", where=name, got=got, do="null means no groups.")
    if (sparsity := getattr(step, "sparsity", None)) is not None:
        sparsity.check(inputs, name)
    if hasattr(step, "group_size"):
        check_grid(step.group_size, inputs, name)


def group_misfit(recipe: Sequence[Placed], inputs: int) -> str:
    """Describe the first group size of a recipe that does not divide a matrix's inputs; empty if all do."""
    sizes = (size for placed in recipe if (size := getattr(placed.step, "group_size", None)) is not None)
    return next((f"group_size {size} does not divide its {inputs} inputs" for size in sizes if inputs % size), "")


def check_order(recipe: Sequence[tuple[str, Any]]) -> None:
    """Check the order of a recipe, given as (method name, step). Raises `UsageError` for input scales after rounding (a
    group of inputs shares a scale), for pruning after rounding (which loses the integers), for exchanges that break an
    n:m pattern, for a correction that does not precede all pruning and rounding, and for a changed bias that is not
    last or has two streams."""
    kinds, got = [step.kind for _, step in recipe], " + ".join(method for method, _ in recipe)
    for place in (place for place, kind in enumerate(kinds) if kind == "correct"):
        before, behind = set(kinds[:place]), set(kinds[place + 1 :])
        if not behind & {"prune", "quantize"} or before - {"allocate", "transform"}:
            what = f"{recipe[place][0]} corrects a matrix before it is pruned or rounded"
            raise UsageError(what, got=got, do="Put it in front: [{method: qep}, {method: gptq, bits: 4}].")
    behind_rounding = recipe[kinds.index("quantize") + 1 :] if "quantize" in kinds else []
    if any(step.kind == "transform" for _, step in behind_rounding):
        what = "a quantized matrix cannot be scaled any more"
        raise UsageError(what, got=got, do="Scale first, then round.")
    if any(step.kind == "prune" or _changes_mask(step) for _, step in behind_rounding):
        what = "a quantized matrix cannot be pruned any more: its integers would be lost"
        raise UsageError(
            what, got=got, do="Prune first, then round: [{method: alps, sparsity: 0.5}, {method: gptq, bits: 4}]."
        )
    steps = [step for _, step in recipe]
    _check_patterns(recipe)
    if takes_two_streams(steps) and any(getattr(step, "changes_bias", False) for step in steps):
        what = "`bias` cannot be combined with methods that need `cross`: the dense inputs' mean is not collected"
        raise UsageError(what, got=got, do="Leave out `bias`, or the methods that need `cross`.")
    if any(getattr(step, "changes_bias", False) for step in steps[:-1]):
        what = "a bias compensates the error of the final matrix, so no step may follow it"
        raise UsageError(what, got=got, do="Put `bias` last.")


def _check_patterns(recipe: Sequence[tuple[str, Any]]) -> None:
    """Raise `UsageError` for a step that exchanges weights between the groups of an n:m pattern of an earlier step."""
    patterns = []
    for method, step in recipe:
        for pattern in patterns if _changes_mask(step) else ():
            if step.group is None or pattern.group % step.group:
                what = f"{method} would exchange weights between the groups of the pattern {pattern}"
                do = f"Add the setting: {{method: {method}, group: {pattern.group}}}."
                raise UsageError(what, got="no group" if step.group is None else f"group {step.group}", do=do)
        if getattr(sparsity := getattr(step, "sparsity", None), "group", None):
            patterns.append(sparsity)


def _changes_mask(step: Any) -> bool:
    return getattr(step, "changes_mask", False)


def run(site: Site, steps: Sequence[Any]) -> Site:
    """Return the site after all steps, in order. An allocator treats this site as the whole model."""
    recipe = tuple(Placed(step) for step in steps)
    allocator = next((step for step in steps if step.kind == ALLOCATE), None)
    if allocator is not None:
        recipe = allotted(recipe, sparsities_over(allocator, [[site]]), [layer.name for layer in site.layers])
    return solve(site, [recipe])[0]


def allotted(recipe: Recipe, sparsities_of: SparsitiesOf, layers: Sequence[str]) -> Recipe:
    """Return a recipe without its allocator: its steps have the sparsities allotted to these layers of one site.

    An allotted sparsity is an ordinary setting, so recipes share prefixes and are stacked as without an allocator.
    """
    steps = (placed for placed in recipe if placed.step.kind != ALLOCATE)
    return tuple(dataclasses.replace(each, step=with_sparsities(each.step, sparsities_of, layers)) for each in steps)


def solve(site: Site, recipes: Sequence[Recipe], statistics_of: StatisticsOf | None = None) -> list[Site]:
    """Return the site after each recipe. Common prefixes of recipes are solved once; steps that start from one state
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
    """Return the state after each step of a stack. Steps see only declared statistics, scaled like the inputs."""
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
    """Return layer problems that share one Hessian (the same tensor object, else `StatisticsError`) as a site. By
    default it has the statistics of the first problem and nothing absorbs scales. Its `shared_factor` is reused."""
    first = problems[0]
    if any(problem.hessian_II is not first.hessian_II for problem in problems):
        raise StatisticsError("layers solved together must share a Hessian", where=first.name)
    if statistics is None:
        hessian_II = first.hessian_II
        own = {} if hessian_II is None else {Statistic.GRAM: hessian_II, Statistic.SQUARE_SUM: hessian_II.diagonal()}
        own |= {which: mean for which, mean in first.further.items() if isinstance(which, Statistic)}
        gradients = {each.name: each.further[Gradient.SQUARE] for each in problems if Gradient.SQUARE in each.further}
        statistics = Statistics(own, first.name, gradients)
    if first.shared_factor is not None:
        statistics.add_factor(first.shared_factor)
    layers = [Layer(p.name, p.weight_OI, Dense(p.weight_OI), stored_dtype=p.stored_dtype) for p in problems]
    return Site(first.name, tuple(layers), statistics, storable_I=storable_I)


def alone(step: Any, problem: LayerProblem) -> LayerSolution:
    """Solve one layer by one step; the `compress` of every method: `COMPRESSORS[name](...).compress(problem)`."""
    site = run(site_of([problem]), [step])
    return solved(problem, site.layers[0], site.scale_I)


def solve_many(problems: Sequence[LayerProblem], steps: Sequence[Any]) -> list[list[LayerSolution]]:
    """Return solutions [step][problem] for layers that share one Hessian; the same as calling `compress` on each."""
    if not problems:
        return [[] for _ in steps]
    sites = solve(site_of(problems), [(Placed(step),) for step in steps])
    return [solutions(problems, site) for site in sites]


def solutions(problems: Sequence[LayerProblem], site: Site) -> list[LayerSolution]:
    """Return the solutions of layer problems from their site after a recipe."""
    return [solved(problem, layer, site.scale_I) for problem, layer in zip(problems, site.layers, strict=True)]
