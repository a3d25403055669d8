"""The matrices of a decoder block and its input sites. A site groups the matrices that read the same tensor.

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
    """One compressible matrix of a block: its parameter and its layout there."""

    name: str
    """E.g. `self_attn.q_proj`, or `mlp.experts.3.down_proj` for one expert of a stack."""
    parameter: str
    """Name of the parameter inside the block, e.g. `self_attn.q_proj.weight`, `mlp.experts.down_proj`."""
    expert: int | None = None
    """Index in a stack of experts."""
    transposed: bool = False
    """Stored as [I, O]."""
    parts: int | None = None
    """Number of experts that a two-dimensional parameter holds, concatenated along its rows."""
    is_called: bool = True
    """It belongs to a linear or a stack of experts that the block calls, rather than being multiplied by directly."""

    NOT_CALLED: ClassVar[str] = "it is used without a linear module, and only linears can be packed"

    def weight_OI(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return a view of the matrix as [O, I]."""
        stored = parameters[self.parameter]
        stored = stored if self.parts is None else stored.unflatten(0, (self.parts, -1))
        stored = stored if self.expert is None else stored[self.expert]
        return stored.mT if self.transposed else stored

    @property
    def bias(self) -> str:
        """Name of the linear's bias, if it has one. Empty for an expert of a stack, whose bias is not changed."""
        return "" if self.expert is not None else f"{self.name}.bias"

    def bias_O(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        return parameters.get(self.bias)


@dataclass(frozen=True)
class InputNorm:
    """The norm that computes a site's input, x = z · (offset + gain) + bias, which only this site reads."""

    name: str
    """E.g. `input_layernorm`."""
    parameters: tuple[str, ...]
    """Names inside the block of its gain and, if it has one, its bias."""
    offset: float = 0.0
    """What the module adds to the gain it stores: 1 in Gemma's norms."""

    def divided(self, parameters: Mapping[str, Tensor], scale_I: Tensor) -> dict[str, Tensor]:
        """Return its parameters, in their own dtype, changed so that its output is divided by s."""
        gain, *bias = self.parameters
        new_gain_I = (parameters[gain].to(scale_I) + self.offset) / scale_I - self.offset
        of_bias = {name: parameters[name].to(scale_I) / scale_I for name in bias}
        return {name: new.to(parameters[name]) for name, new in ({gain: new_gain_I} | of_bias).items()}

    def storable_I(self, parameters: Mapping[str, Tensor], scale_I: Tensor) -> Tensor:
        """Return the s that dividing by `scale_I` really applies once the new gain is rounded to its stored dtype.

        Weights multiplied by it compensate for the rounding. 1 where the quotient is not finite and positive."""
        gain = self.parameters[0]
        before_I, after_I = (
            held[gain].to(scale_I) + self.offset for held in (parameters, self.divided(parameters, scale_I))
        )
        storable_I = before_I / after_I
        return torch.where(storable_I.isfinite() & (storable_I > 0), storable_I, torch.ones_like(scale_I))


@dataclass(frozen=True)
class Site:
    """Matrices that read the same tensor and therefore share one Hessian. Named after the first of them."""

    name: str
    matrices: tuple[MatrixRef, ...]
    inputs: int
    producer: InputNorm | None = None
    """The norm to divide by scales that the matrices are multiplied by; None: see `no_producer`."""
    no_producer: str = ""
    """Why scales of this input cannot be folded into a norm."""

    @property
    def is_called(self) -> bool:
        """Whether its matrices belong to linears that the block calls, not to stacked experts."""
        return self.matrices[0].is_called and self.matrices[0].expert is None

    def without(self, block: str, leave_dense: Collection[str]) -> Site:
        """Return the site without the matrices that a pattern matches; if any, its input cannot be scaled any more."""
        kept = tuple(matrix for matrix in self.matrices if not is_left(f"{block}.{matrix.name}", leave_dense))
        if len(kept) == len(self.matrices):
            return self
        return dataclasses.replace(self, matrices=kept, producer=None, no_producer="a matrix that reads it stays dense")


@dataclass(frozen=True)
class LeftDense:
    """A parameter of two or more dimensions that no method changes, and the reason."""

    name: str
    """E.g. `mlp.gate`."""
    parameter: str
    reason: str
    must_be_asked: bool = False
    """It cannot be calibrated: `check_all` raises unless a pattern of the plan's `leave_dense` matches it."""


@dataclass(frozen=True)
class Matrices:
    """Every matrix of a block: its sites, and the parameters that stay dense."""

    sites: tuple[Site, ...]
    left_dense: tuple[LeftDense, ...]

    def check(self, block: str, leave_dense: Collection[str] = ()) -> None:
        """`check_all` for one block of this name, e.g. `model.layers.3`."""
        check_all({block: self}, leave_dense)


def check_all(found: Mapping[str, Matrices], leave_dense: Collection[str] = ()) -> None:
    """Raise `UnsupportedModel` if a matrix cannot be calibrated and no pattern of `leave_dense` matches it.

    `found`: block name -> its matrices. One error names all such matrices.
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
    """Whether any pattern (e.g. `*.encoder_attn.*`) matches a matrix's full name."""
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def replaced_parameters(parameters: Mapping[str, Tensor], weights_OI: Mapping[MatrixRef, Tensor]) -> dict[str, Tensor]:
    """Return the block's parameters that contain these matrices, whole, in stored layout, with the new weights."""
    changed: dict[str, Tensor] = {}
    for matrix, weight_OI in weights_OI.items():
        if matrix.parameter not in changed:
            changed[matrix.parameter] = parameters[matrix.parameter].detach().clone()
        matrix.weight_OI(changed).copy_(weight_OI)
    return changed


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the one argument of a linear, passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def without_bias(model: PreTrainedModel) -> list[str]:
    """Names inside a block, over all blocks without duplicates: linears without a bias, and stacks of experts."""
    modules = [(name, module) for block in find_blocks(model)[1] for name, module in block.named_modules()]
    lacking = (name for name, module in modules if is_linear(module) and getattr(module, "bias", None) is None)
    return list(dict.fromkeys([*lacking, *(name for name, module in modules if experts.is_experts(module))]))


def outputs(linear: nn.Module) -> int:
    return linear.get_parameter("weight").shape[1 if isinstance(linear, Conv1D) else 0]


@contextmanager
def pre_hooks(
    modules: Mapping[str, nn.Module], note: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Context: call `note(name, module, args, kwargs)` before each of these modules runs."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                note(name, module, args, kwargs)

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
