"""The input sites of a decoder block: which of its matrices read the same tensor.

Shapes: O outputs, I inputs of a matrix, E experts.

Found by watching one forward pass: linears that are handed the same tensor object share a site (q, k, v; gate, up).
Every matrix of the block is accounted for: solved, or named with the reason why it stays as it is. Routers of mixtures
of experts do: they are tiny, and a changed choice of expert is not an error that a Hessian of their inputs measures.
What a router is follows from the flow of the data (`flow.py`), not from names or sizes. Anything else that is large and
not understood is an error, never a silent omission.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from crosscal.errors import UnsupportedModel
from crosscal.models import experts
from crosscal.models.blocks import find_blocks
from crosscal.models.flow import DataFlow

LARGE = 16
"""A parameter is a matrix to account for when two of its dimensions exceed this: depthwise convolutions and the state
matrices of recurrent layers stay below, and have nothing to prune."""
ROUTER = "a router: it only chooses what others read"
GATE = "a gate of one output"
SMALL = f"no two dimensions above {LARGE}"


@dataclass(frozen=True)
class MatrixRef:
    """One compressible matrix of a block: where it is and how it lies there."""

    name: str
    """E.g. `self_attn.q_proj`, or `mlp.experts.3.down_proj` for one expert of a stack."""
    parameter: str
    """Name of the parameter inside the block, e.g. `self_attn.q_proj.weight`, `mlp.experts.down_proj`."""
    expert: int | None = None
    """Its place in a stack of experts."""
    transposed: bool = False
    """Stored as [I, O]."""

    def weight_OI(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """A view of the matrix, outputs first."""
        stored = parameters[self.parameter]
        stored = stored if self.expert is None else stored[self.expert]
        return stored.mT if self.transposed else stored

    @property
    def bias(self) -> str:
        """Name of the bias beside it, if there is one: a stack of experts has them elsewhere, and they are left."""
        return "" if self.expert is not None else f"{self.name}.bias"

    def bias_O(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        return parameters.get(self.bias)


@dataclass(frozen=True)
class Producer:
    """The norm that makes a site's input, x = z · (offset + gain) + bias, and that nothing else reads."""

    name: str
    """E.g. `input_layernorm`."""
    parameters: tuple[str, ...]
    """Names of its gain and, if it has one, its bias inside the block."""
    offset: float = 0.0
    """What the module adds to the gain it stores: 1 in Gemma's norms."""

    def divided(self, parameters: Mapping[str, Tensor], scale_I: Tensor) -> dict[str, Tensor]:
        """Its parameters when its output is to come divided by s, in their own dtype."""
        gain, *bias = self.parameters
        new_gain_I = (parameters[gain].to(scale_I) + self.offset) / scale_I - self.offset
        of_bias = {name: parameters[name].to(scale_I) / scale_I for name in bias}
        return {name: new.to(parameters[name]) for name, new in ({gain: new_gain_I} | of_bias).items()}

    def storable_I(self, parameters: Mapping[str, Tensor], scale_I: Tensor) -> Tensor:
        """The s nearest to this one that the gain, as it is stored, can be divided by exactly: what its rounding takes
        away, the weights can make up for. 1 where the gain would be lost."""
        gain = self.parameters[0]
        before_I, after_I = (
            held[gain].to(scale_I) + self.offset for held in (parameters, self.divided(parameters, scale_I))
        )
        storable_I = before_I / after_I
        return torch.where(storable_I.isfinite() & (storable_I > 0), storable_I, torch.ones_like(scale_I))


@dataclass(frozen=True)
class Site:
    """Matrices that read one tensor, and so share one Hessian. Named after the first of them."""

    name: str
    matrices: tuple[MatrixRef, ...]
    inputs: int
    producer: Producer | None = None
    """What can be divided by scales that the matrices are multiplied by; None: see `no_producer`."""
    no_producer: str = ""
    """Why scales of this input cannot be moved anywhere."""


@dataclass(frozen=True)
class LeftDense:
    """A parameter of two dimensions or more that no method changes, and why."""

    name: str
    """E.g. `mlp.gate`."""
    parameter: str
    reason: str


@dataclass(frozen=True)
class Matrices:
    """Every matrix of a block: in the order they are reached, and those that stay as they are."""

    sites: tuple[Site, ...]
    left_dense: tuple[LeftDense, ...]


def replaced_parameters(parameters: Mapping[str, Tensor], weights_OI: Mapping[MatrixRef, Tensor]) -> dict[str, Tensor]:
    """The block's parameters that change when these matrices do, whole and as they are stored."""
    changed: dict[str, Tensor] = {}
    for matrix, weight_OI in weights_OI.items():
        if matrix.parameter not in changed:
            changed[matrix.parameter] = parameters[matrix.parameter].detach().clone()
        matrix.weight_OI(changed).copy_(weight_OI)
    return changed


def find_sites(block: nn.Module, run: Callable[[], object]) -> tuple[Site, ...]:
    """The sites alone of what `find_matrices` finds."""
    return find_matrices(block, run).sites


def find_matrices(block: nn.Module, run: Callable[[], object]) -> Matrices:
    """Every matrix of a block, seen while `run()` runs it once in this thread.

    Raises `UnsupportedModel`, naming the module, for a matrix that cannot be calibrated.
    """
    linears = {name: module for name, module in block.named_modules() if is_linear(module) and _outputs(module) > 1}
    stacks = {name: module for name, module in block.named_modules() if experts.is_experts(module)}
    flow = DataFlow(block)
    routers: set[str] = set()
    seen: dict[str, Tensor] = {}  # holds the inputs, so that no tensor's identity is used again
    versions: dict[str, int] = {}
    stacks_seen: set[str] = set()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in seen or name in stacks_seen:
            raise UnsupportedModel("this matrix is used more than once in a block", where=name)
        read = input_of(args, kwargs) if name in linears else next(iter(_arguments(module, args, kwargs)))
        choosing = flow.origin((args, kwargs)).at_all - flow.origin(read).by_value
        routers.update(choosing)
        if name in linears:
            seen[name], versions[name] = read, read._version
            return
        stacks_seen.add(name)
        if not choosing:
            raise UnsupportedModel("what routes tokens to these experts cannot be told", where=name)

    with pre_hooks(linears | stacks, note), flow:
        run()
    solved = {name: module for name, module in linears.items() if f"{name}.weight" not in routers}
    _refuse_unknown(block, solved, routers)
    unused = [name for name in solved if name not in seen]
    if unused:
        raise UnsupportedModel("this matrix never receives an input, so it cannot be calibrated", where=unused[0])
    shared: dict[tuple[int, int], list[str]] = {}
    for name in (name for name in seen if name in solved):
        shared.setdefault((id(seen[name]), versions[name]), []).append(name)
    dense = [_linear_site(names, solved) for names in shared.values()]
    sites = (*dense, *(site for name, module in stacks.items() for site in _expert_sites(name, module)))
    return Matrices(sites, tuple(_left_dense(block, sites, routers)))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one argument of a linear, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def without_bias(model: PreTrainedModel) -> list[str]:
    """Linears of the blocks, and stacks of experts, that have no bias of their own; each name once for all blocks."""
    modules = [(name, module) for block in find_blocks(model)[1] for name, module in block.named_modules()]
    lacking = (name for name, module in modules if is_linear(module) and getattr(module, "bias", None) is None)
    return list(dict.fromkeys([*lacking, *(name for name, module in modules if experts.is_experts(module))]))


def _outputs(linear: nn.Module) -> int:
    return linear.get_parameter("weight").shape[1 if isinstance(linear, Conv1D) else 0]


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """A call's arguments in the order of the module's signature."""
    return list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]


@contextmanager
def pre_hooks(
    modules: Mapping[str, nn.Module], note: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Inside, `note(name, module, args, kwargs)` is called before each of these modules runs."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                note(name, module, args, kwargs)

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _linear_site(names: list[str], linears: Mapping[str, nn.Module]) -> Site:
    matrices = tuple(MatrixRef(name, f"{name}.weight", transposed=isinstance(linears[name], Conv1D)) for name in names)
    return Site(
        names[0],
        matrices,
        matrices[0].weight_OI({matrices[0].parameter: linears[names[0]].get_parameter("weight")}).shape[1],
    )


def _expert_sites(name: str, module: nn.Module) -> Iterator[Site]:
    for expert in range(experts.count(module)):
        for part in (experts.up_name(module), "down_proj"):
            path = f"{name}.{part}".removeprefix(".")
            matrix = MatrixRef(f"{name}.{expert}.{part}".removeprefix("."), path, expert, bool(module.is_transposed))
            yield Site(matrix.name, (matrix,), matrix.weight_OI({path: module.get_parameter(part)}).shape[1])


def _left_dense(block: nn.Module, sites: tuple[Site, ...], routers: set[str]) -> Iterator[LeftDense]:
    solved = {matrix.parameter for site in sites for matrix in site.matrices}
    stacks = {name for name, module in block.named_modules() if experts.is_experts(module)}
    for parameter, tensor in block.named_parameters():
        owner, _, kind = parameter.rpartition(".")
        if tensor.ndim < 2 or parameter in solved or owner in stacks:  # what else a stack holds are its biases
            continue
        is_gate = is_linear(block.get_submodule(owner)) and _outputs(block.get_submodule(owner)) == 1
        reason = ROUTER if parameter in routers else GATE if is_gate else SMALL
        yield LeftDense(owner if kind == "weight" else parameter, parameter, reason)


def _refuse_unknown(block: nn.Module, solved: Mapping[str, nn.Module], routers: set[str]) -> None:
    for name, module in block.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            path = f"{name}.{parameter}".removeprefix(".")
            is_large = tensor.ndim > 1 and sorted(tensor.shape)[-2] > LARGE
            is_known = path in routers or experts.is_experts(module) or (name in solved and parameter == "weight")
            if is_large and not is_known:
                raise UnsupportedModel(
                    f"{type(module).__name__} holds a matrix that crosscal does not know how to calibrate",
                    where=path,
                    got=f"shape {tuple(tensor.shape)}",
                )
