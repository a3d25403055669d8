"""Find the norm that produces a site's input, into which the inverse of scales on the site's weights can be folded.

Shapes: I inputs of a site.

Candidates come from one forward pass: the norm whose output is the same tensor that the site's matrices read. Two more
forward passes verify each: dividing the norm and multiplying the matrices by a random s must leave the block's output
unchanged. It changes if anything else depends on the norm (a router, a residual branch), or if the norm computes
something other than assumed. All scales are powers of two, and the norms' own gains are replaced by 1 and their biases
by powers of two, so that a correct fold changes no bit in any dtype. Matrices that produce the inputs of other matrices
(v and o, up and down) are not considered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from crosscal.models.attaching import attached
from crosscal.models.sites import InputNorm, Site, input_of, is_linear, pre_hooks, replaced_parameters

OFFSETS = (0.0, 1.0)
"""What a norm adds to its stored gain: nothing, or 1 (Gemma)."""
TOLERANCE = 1e-6
"""Relative to the output's norm. A correct fold gives exactly 0, unless the order of some sum is not fixed."""
NO_NORM = "no norm makes its input"
EXPERT = "an expert shares its input with the router and other experts"
TIED = "{} is tied to another parameter of the model"
OTHERS = "something else depends on {}"


def with_producers(
    block: nn.Module, sites: Sequence[Site], run: Callable[[], Tensor], tied: Collection[str] = ()
) -> tuple[Site, ...]:
    """Return the sites, each with its producer or the reason why it has none.

    `run()` returns the block's output and is deterministic. `tied`: the block's parameters that are tied to another
    parameter of the model."""
    makers = _makers(block, sites, run)
    reasons = {site.name: EXPERT if site.matrices[0].expert is not None else NO_NORM for site in sites}
    candidates: dict[Site, InputNorm] = {}
    for site in (site for site in sites if site.name in makers):
        name = makers[site.name]
        if len(block.get_submodule(name).get_parameter("weight")) != site.inputs:
            continue  # the matrices read a view of the norm's output with another last dimension
        parameters = tuple(f"{name}.{part}" for part, _ in block.get_submodule(name).named_parameters(recurse=False))
        lost = [parameter for parameter in parameters if parameter in tied]
        reasons[site.name] = TIED.format(lost[0]) if lost else OTHERS.format(name)
        if not lost:
            candidates[site] = InputNorm(name, parameters)
    found = _verified(block, candidates, run)
    return tuple(
        dataclasses.replace(site, producer=found[site])
        if site in found
        else dataclasses.replace(site, no_producer=reasons[site.name])
        for site in sites
    )


def _makers(block: nn.Module, sites: Sequence[Site], run: Callable[[], object]) -> dict[str, str]:
    """Site -> the norm whose output, or a view of it, its matrices read, with no in-place change in between."""
    made: dict[int, tuple[str, int, Tensor]] = {}  # keeps the outputs alive, so that no `id` is reused
    makers: dict[str, str] = {}

    def note_input(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = _whole(input_of(args, kwargs))
        norm, version, _ = made.get(id(read), ("", -1, None))
        if version == read._version:
            makers[name] = norm

    linears = {site.name: block.get_submodule(site.name) for site in sites if site.is_called}
    with ExitStack() as stack, pre_hooks(linears, note_input):
        for name, norm in block.named_modules():
            if _is_norm(norm):

                def note_output(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        made[id(_whole(output))] = (name, output._version, _whole(output))

                stack.callback(norm.register_forward_hook(note_output).remove)
        run()
    return makers


def _whole(tensor: Tensor) -> Tensor:
    """Return the base tensor of a view, or the tensor itself."""
    return tensor if tensor._base is None else tensor._base


def _is_norm(module: nn.Module) -> bool:
    """Whether a module's own parameters are a one-dimensional gain and at most a bias, and it is not a linear."""
    own = dict(module.named_parameters(recurse=False))
    names = list(own)
    return (
        names in (["weight"], ["weight", "bias"]) and all(p.ndim == 1 for p in own.values()) and not is_linear(module)
    )


def _verified(
    block: nn.Module, candidates: Mapping[Site, InputNorm], run: Callable[[], Tensor]
) -> dict[Site, InputNorm]:
    """Return the candidates that pass: tested all at once, and one by one if that fails."""
    if not candidates:
        return {}
    for offset in OFFSETS:
        supposed = {site: dataclasses.replace(producer, offset=offset) for site, producer in candidates.items()}
        if _holds(block, supposed, run):
            return supposed
    if len(candidates) == 1:
        return {}
    return {k: v for site, producer in candidates.items() for k, v in _verified(block, {site: producer}, run).items()}


def _holds(block: nn.Module, folds: Mapping[Site, InputNorm], run: Callable[[], Tensor]) -> bool:
    """Whether the block's output is unchanged when random scales are folded."""
    chance = torch.Generator().manual_seed(0)
    parameters = dict(block.named_parameters())
    plain: dict[str, Tensor] = {}
    folded: dict[str, Tensor] = {}
    for site, producer in folds.items():
        gain, *bias = producer.parameters
        scale_I = _powers_of_two(parameters[gain], chance)
        own = {gain: torch.ones_like(parameters[gain]) - producer.offset}
        own |= {name: _powers_of_two(parameters[name], chance) for name in bias}
        weights = {matrix: matrix.weight_OI(parameters) * scale_I for matrix in site.matrices}
        plain |= own
        folded |= producer.divided(own, scale_I) | replaced_parameters(parameters, weights)
    with attached(block, plain):
        before = run()
    with attached(block, plain | folded):
        after = run()
    return bool((after - before).norm() <= TOLERANCE * before.norm())


def _powers_of_two(like: Tensor, chance: torch.Generator) -> Tensor:
    """Random values out of 1/4, 1/2, 2 and 4: never 1."""
    exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, like.shape, generator=chance)]
    return exponents.exp2().to(like)
