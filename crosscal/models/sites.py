"""The input sites of a decoder block: which of its matrices read the same tensor.

Shapes: O outputs, I inputs of a matrix, E experts.

Found by watching one forward pass: linears that are handed the same tensor object share a site (q, k, v; gate, up).
Every matrix of the block is accounted for. Routers of mixtures of experts stay as they are: they are tiny, and a
changed choice of expert is not an error that a Hessian of their inputs measures. Anything else that is large and not
understood is an error, never a silent omission.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from crosscal.errors import UnsupportedModel
from crosscal.models import experts

LARGE = 16
"""A parameter is a matrix to account for when two of its dimensions exceed this: depthwise convolutions and the state
matrices of recurrent layers stay below, and have nothing to prune."""


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


@dataclass(frozen=True)
class Site:
    """Matrices that read one tensor, and so share one Hessian. Named after the first of them."""

    name: str
    matrices: tuple[MatrixRef, ...]
    inputs: int


def replaced_parameters(parameters: Mapping[str, Tensor], weights_OI: Mapping[MatrixRef, Tensor]) -> dict[str, Tensor]:
    """The block's parameters that change when these matrices do, whole and as they are stored."""
    changed: dict[str, Tensor] = {}
    for matrix, weight_OI in weights_OI.items():
        if matrix.parameter not in changed:
            changed[matrix.parameter] = parameters[matrix.parameter].detach().clone()
        matrix.weight_OI(changed).copy_(weight_OI)
    return changed


def find_sites(block: nn.Module, run: Callable[[], object]) -> tuple[Site, ...]:
    """The sites of a block in the order they are reached, seen while `run()` runs it once.

    Raises `UnsupportedModel`, naming the module, for a matrix that cannot be calibrated.
    """
    routers = set(_router_modules(block))
    linears = {name: module for name, module in block.named_modules() if is_linear(module) and name not in routers}
    _refuse_unknown(block, linears, routers)
    seen: dict[str, Tensor] = {}  # holds the inputs, so that no tensor's identity is used again
    versions: dict[str, int] = {}

    stacks = dict(_experts(block))
    stacks_seen: set[str] = set()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in seen or name in stacks_seen:
            raise UnsupportedModel("this matrix is used more than once in a block", where=name)
        if name in stacks:
            stacks_seen.add(name)
        else:
            seen[name] = input_of(args, kwargs)
            versions[name] = seen[name]._version

    with pre_hooks(linears | stacks, note):
        run()
    unused = [name for name in linears if name not in seen]
    if unused:
        raise UnsupportedModel("this matrix never receives an input, so it cannot be calibrated", where=unused[0])
    shared: dict[tuple[int, int], list[str]] = {}
    for name in seen:
        shared.setdefault((id(seen[name]), versions[name]), []).append(name)
    dense = [_linear_site(names, linears) for names in shared.values()]
    return (*dense, *(site for name, module in _experts(block) for site in _expert_sites(name, module)))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one argument of a linear, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


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


def _experts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in block.named_modules() if experts.is_experts(module))


def _router_modules(block: nn.Module) -> Iterator[str]:
    """Modules beside a stack of experts with one row of weights per expert, or one in all (a shared expert's gate)."""
    for name, stack in _experts(block):
        parent = name.rpartition(".")[0]
        for child, module in block.get_submodule(parent).named_modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] in (1, experts.count(stack)):
                yield f"{parent}.{child}".removeprefix(".")


def _refuse_unknown(block: nn.Module, linears: Mapping[str, nn.Module], routers: set[str]) -> None:
    known = {*linears, *routers, *(name for name, _ in _experts(block))}
    for name, module in block.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            is_large = tensor.ndim > 1 and sorted(tensor.shape)[-2] > LARGE
            if is_large and (name not in known or (name in linears and parameter != "weight")):
                raise UnsupportedModel(
                    f"{type(module).__name__} holds a matrix that crosscal does not know how to calibrate",
                    where=f"{name}.{parameter}".removeprefix("."),
                    got=f"shape {tuple(tensor.shape)}",
                )
