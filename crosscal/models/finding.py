"""Find every matrix of a decoder block by observing a forward pass.

Shapes: O outputs, I inputs of a matrix, E experts.

Linears that read the same tensor object share a site (q, k, v; gate, up). Stacked experts are split by transformers'
own marks (`experts.py`), and other matrices that are used without a linear are found by their products (`products.py`).
Every matrix of the block is accounted for: either it is in a site, or it is listed with the reason why it stays dense.
Routers of mixtures of experts stay dense: they are tiny, and the Hessian of their inputs does not measure the error of
choosing another expert. Routers are identified by data flow (`flow.py`), not by names or sizes. A matrix that cannot be
calibrated is left dense only if the user names it, never silently.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from crosscal.models import experts
from crosscal.models.flow import DataFlow
from crosscal.models.products import NEVER, TWICE, Layout, Product, Products, layouts
from crosscal.models.sites import LeftDense, Matrices, MatrixRef, Site, input_of, is_linear, outputs, pre_hooks

LARGE = 16
"""A parameter counts as a matrix if two of its dimensions exceed this. Depthwise convolutions and the state matrices of
recurrent layers stay below; there is nothing to prune in them."""
ROUTER = "a router: it only chooses what others read"
GATE = "a gate of one output"
SMALL = f"no two dimensions above {LARGE}"
TIED = "this parameter is tied to another one of the model, so it cannot change alone"
UNROUTED = "the router of these experts could not be identified"


def find_sites(block: nn.Module, run: Callable[[], object]) -> tuple[Site, ...]:
    """Return the sites of `find_matrices`. Raises `UnsupportedModel` if a matrix cannot be calibrated."""
    found = find_matrices(block, run)
    found.check("")
    return found.sites


def find_matrices(block: nn.Module, run: Callable[[], object]) -> Matrices:
    """Return every matrix of a block. `run()` runs the block in this thread; it is called once or twice."""
    seen = _Seen(block)
    with pre_hooks(seen.linears | seen.stacks, seen.note), seen.flow:
        run()
    unexplained = seen.unexplained
    if unexplained:
        products: list[Product] = []
        with Products(unexplained, products.append), seen.watching(unexplained), seen.flow:
            run()
        found, why_not = layouts(unexplained, ((p.parameter, p.place, p.layout) for p in products))
        seen.why_not |= why_not
        seen.raw |= found
    return Matrices(tuple(seen.sites()), tuple(seen.left_dense()))


def without_tied(found: Matrices, tied: Collection[str]) -> Matrices:
    """Move matrices whose parameter is in `tied` from the sites to `left_dense`: they cannot change on their own."""
    sites: list[Site] = []
    left = list(found.left_dense)
    for site in found.sites:
        kept = tuple(matrix for matrix in site.matrices if matrix.parameter not in tied)
        lost = [matrix for matrix in site.matrices if matrix not in kept]
        left += [LeftDense(matrix.name, matrix.parameter, TIED, must_be_asked=True) for matrix in lost]
        sites += [dataclasses.replace(site, matrices=kept)] if kept else []
    return Matrices(tuple(sites), tuple(left))


@dataclass(eq=False)
class _Seen:
    """Observations from one forward pass of a block."""

    block: nn.Module
    routers: set[str] = field(default_factory=set)
    """Names of parameters."""
    inputs: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """Linear -> its input and the input's version. The tensor is kept alive, so that no `id` is reused."""
    reached: set[str] = field(default_factory=set)
    """Stacks of experts that ran."""
    why_not: dict[str, str] = field(default_factory=dict)
    """Parameter -> why it cannot be calibrated."""
    raw: dict[str, Layout] = field(default_factory=dict)
    """Parameters that are multiplied by without a linear."""

    def __post_init__(self) -> None:
        self.flow = DataFlow(self.block)

    @cached_property
    def linears(self) -> dict[str, nn.Module]:
        return {
            name: module for name, module in self.block.named_modules() if is_linear(module) and outputs(module) > 1
        }

    @cached_property
    def stacks(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.block.named_modules() if experts.is_experts(module)}

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_linear = name in self.linears
        read = input_of(args, kwargs) if is_linear else next(iter(_arguments(module, args, kwargs)))
        choosing = self.flow.choosing((args, kwargs), read)
        self.routers |= choosing
        parameters = [f"{name}.weight"] if is_linear else [path for path, _ in _stacked(name, module)]
        if name in self.inputs or name in self.reached:
            self.why_not |= dict.fromkeys(parameters, TWICE)
        elif is_linear and _multiplies(module, args, kwargs):
            self.inputs[name] = (read, read._version)
        elif is_linear:
            return  # its products show how its weight is used
        else:
            self.reached.add(name)
            if not choosing:
                self.why_not |= dict.fromkeys(parameters, UNROUTED)

    @property
    def unexplained(self) -> dict[str, Tensor]:
        """Large parameters not yet explained by a linear or a stack of experts that ran."""
        known = {*self.routers, *self.why_not, *(f"{name}.weight" for name in self.inputs)}
        known |= {path for name in self.reached for path, _ in _stacked(name, self.stacks[name])}
        owners = tuple(f"{name}." for name in self.stacks)
        return {
            name: parameter
            for name, parameter in self.block.named_parameters()
            if _is_large(parameter) and name not in known and not name.startswith(owners)
        }

    def watching(self, parameters: Mapping[str, Tensor]) -> Any:
        return self.flow.watching(parameters, self.routers.update)

    def sites(self) -> Iterator[Site]:
        left = {*self.routers, *self.why_not}
        shared: dict[tuple[int, int], list[str]] = {}
        for name, (read, version) in self.inputs.items():
            if f"{name}.weight" not in left:
                shared.setdefault((id(read), version), []).append(name)
        yield from (_linear_site(names, self.linears) for names in shared.values())
        for name, module in self.stacks.items():
            if name in self.reached and not {path for path, _ in _stacked(name, module)} & left:
                yield from _expert_sites(name, module)
        for name, layout in self.raw.items():
            if name not in left:
                yield from _raw_sites(name, self.block.get_parameter(name), layout)

    def left_dense(self) -> Iterator[LeftDense]:
        solved = {matrix.parameter for site in self.sites() for matrix in site.matrices}
        for parameter, tensor in self.block.named_parameters():
            owner, _, kind = parameter.rpartition(".")
            is_bias = owner in self.stacks and parameter not in {p for p, _ in _stacked(owner, self.stacks[owner])}
            if tensor.ndim < 2 or parameter in solved or is_bias:
                continue
            name = owner if kind == "weight" else parameter
            module = self.block.get_submodule(owner)
            if parameter in self.routers:
                yield LeftDense(name, parameter, ROUTER)
            elif is_linear(module) and outputs(module) == 1:
                yield LeftDense(name, parameter, GATE)
            elif _is_large(tensor) or owner in self.stacks:
                yield LeftDense(name, parameter, self.why_not.get(parameter, NEVER), must_be_asked=True)
            else:
                yield LeftDense(name, parameter, SMALL)


def _multiplies(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a linear computes x Wᵀ + b, up to sqrt(eps): a subclass of `nn.Linear` may multiply in groups
    (DeepSeek-V4)."""
    own = type(linear).forward
    if own in (nn.Linear.forward, Conv1D.forward):
        return True
    read, weight_OI = input_of(args, kwargs), linear.get_parameter("weight")
    if isinstance(linear, Conv1D) or read.shape[-1] != weight_OI.shape[1]:
        return False
    made, plain = own(linear, *args, **kwargs), functional.linear(read, weight_OI, getattr(linear, "bias", None))
    if not isinstance(made, Tensor) or made.shape != plain.shape:
        return False
    return bool((made - plain).float().norm() <= torch.finfo(plain.dtype).eps ** 0.5 * plain.float().norm())


def _is_large(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and sorted(tensor.shape)[-2] > LARGE


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a call's arguments in the order of the module's signature."""
    return list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]


def _linear_site(names: Collection[str], linears: Mapping[str, nn.Module]) -> Site:
    matrices = tuple(MatrixRef(name, f"{name}.weight", transposed=isinstance(linears[name], Conv1D)) for name in names)
    weight = linears[matrices[0].name].get_parameter("weight")
    return Site(matrices[0].name, matrices, matrices[0].weight_OI({matrices[0].parameter: weight}).shape[1])


def _stacked(name: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return (name in the block, name in the module) of a stack's two parameters."""
    return [(f"{name}.{part}".removeprefix("."), part) for part in (experts.up_name(module), "down_proj")]


def _expert_sites(name: str, module: nn.Module) -> Iterator[Site]:
    for expert in range(experts.count(module)):
        for path, part in _stacked(name, module):
            matrix = MatrixRef(f"{name}.{expert}.{part}".removeprefix("."), path, expert, bool(module.is_transposed))
            yield Site(matrix.name, (matrix,), matrix.weight_OI({path: module.get_parameter(part)}).shape[1])


def _raw_sites(path: str, parameter: Tensor, layout: Layout) -> Iterator[Site]:
    count = layout.count(parameter)
    is_flat = count > 1 and parameter.ndim == 2
    owner, _, part = path.rpartition(".")
    for place in range(count):
        name = path.removesuffix(".weight") if count == 1 else f"{owner}.{place}.{part}".removeprefix(".")
        expert = None if parameter.ndim == 2 and count == 1 else place
        matrix = MatrixRef(name, path, expert, layout.transposed, parts=count if is_flat else None, is_called=False)
        yield Site(name, (matrix,), matrix.weight_OI({path: parameter}).shape[1])
