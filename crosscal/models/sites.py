"""The matrices of a decoder block, and its input sites: which of them read the same tensor.

Shapes: O outputs, I inputs of a matrix, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from crosscal.errors import UnsupportedModel
from crosscal.models import experts
from crosscal.models.blocks import find_blocks


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
    parts: int | None = None
    """A two-dimensional parameter holds so many experts, one below the other."""
    is_called: bool = True
    """It belongs to a linear, or a stack of experts, that the block calls: not multiplied by elsewhere."""

    NOT_CALLED: ClassVar[str] = "it is multiplied by without a linear, which alone can be packed"

    def weight_OI(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """A view of the matrix, outputs first."""
        stored = parameters[self.parameter]
        stored = stored if self.parts is None else stored.unflatten(0, (self.parts, -1))
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

    @property
    def is_called(self) -> bool:
        """Whether its matrices belong to linears that the block calls."""
        return self.matrices[0].is_called and self.matrices[0].expert is None

    def without(self, block: str, leave_dense: Collection[str]) -> Site:
        """The site without the matrices that a pattern names; as these read the same input, it cannot be scaled."""
        kept = tuple(matrix for matrix in self.matrices if not is_left(f"{block}.{matrix.name}", leave_dense))
        if len(kept) == len(self.matrices):
            return self
        return dataclasses.replace(self, matrices=kept, producer=None, no_producer="a matrix that reads it stays dense")


@dataclass(frozen=True)
class LeftDense:
    """A parameter of two dimensions or more that no method changes, and why."""

    name: str
    """E.g. `mlp.gate`."""
    parameter: str
    reason: str
    must_be_asked: bool = False
    """It could not be calibrated: only a plan that names it may go on."""


@dataclass(frozen=True)
class Matrices:
    """Every matrix of a block: in the order they are reached, and those that stay as they are."""

    sites: tuple[Site, ...]
    left_dense: tuple[LeftDense, ...]

    def check(self, block: str, leave_dense: Collection[str] = ()) -> None:
        """As `check_all`, of one block with this name, e.g. `model.layers.3`."""
        check_all({block: self}, leave_dense)


def check_all(found: Mapping[str, Matrices], leave_dense: Collection[str] = ()) -> None:
    """Raises `UnsupportedModel` if some matrix cannot be calibrated that no pattern of `leave_dense` matches.

    `found`: by the blocks' names. All such matrices are named at once.
    """
    missing = [
        (f"{block}.{one.name}".removeprefix("."), one)
        for block, matrices in found.items()
        for one in matrices.left_dense
        if one.must_be_asked and not is_left(f"{block}.{one.name}", leave_dense)
    ]
    if missing:
        where, first = missing[0]
        patterns = list(dict.fromkeys(f"*.{one.name}" for _, one in missing))
        raise UnsupportedModel(
            first.reason,
            where=where,
            got=f"{len(missing)} such matrices" if len(missing) > 1 else "",
            do=f"To compress the others, name it in the plan: `leave_dense: {json.dumps(patterns)}`.",
        )


def is_left(layer: str, patterns: Collection[str]) -> bool:
    """Whether a pattern (`*.encoder_attn.*`) matches a matrix's full name."""
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def replaced_parameters(parameters: Mapping[str, Tensor], weights_OI: Mapping[MatrixRef, Tensor]) -> dict[str, Tensor]:
    """The block's parameters that change when these matrices do, whole and as they are stored."""
    changed: dict[str, Tensor] = {}
    for matrix, weight_OI in weights_OI.items():
        if matrix.parameter not in changed:
            changed[matrix.parameter] = parameters[matrix.parameter].detach().clone()
        matrix.weight_OI(changed).copy_(weight_OI)
    return changed


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


def outputs(linear: nn.Module) -> int:
    return linear.get_parameter("weight").shape[1 if isinstance(linear, Conv1D) else 0]


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
