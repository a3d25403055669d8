"""Determine which matrices of a model can be stored packed, and under which names, before anything is solved.

The criterion is not only the format but whether transformers can load the result. Its own code is run on the skeleton
to find out how it renames the tensors of a quantized checkpoint, how it splits a stack of experts into the linears of
the hub checkpoint, and which weights it accesses when it initialises a model, which fails if they are packed.

Shapes: E experts, O outputs (rows), I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from crosscal.errors import ModelError
from crosscal.models import experts
from crosscal.models.building import ONE_AT_A_TIME, owner_of
from crosscal.models.export import PACKED
from crosscal.models.naming import Naming
from crosscal.models.weights import Weights

TRANSPOSED = "stored transposed (Conv1D), which the packed format cannot hold"
FUSED = "a stack of experts that transformers does not load as packed linears"
SPECIAL = "a linear that multiplies in a way of its own (in groups, say), which readers of packed linears do not know"
INITIALISED = "transformers initialises this weight on loading, and fails where it is packed"
REBUILT = "transformers builds a quantized model of this family from other modules, which dense tensors do not fit"
RENAMED = "transformers does not find the packed tensors of this linear under any name"


@dataclass(frozen=True)
class PackedLinear:
    """A linear of a packed checkpoint: its name there, and the rows of a matrix that it holds."""

    name: str
    """E.g. `model.layers.0.mlp.experts.3.up_proj`."""
    expert: int | None
    first_row: int
    rows: int
    step: int = 1
    """2 if the rows of gate and up alternate."""

    def of(self, matrix_OX: Tensor) -> Tensor:
        """Return its rows of the matrix, or of another tensor with the same rows, such as the scales."""
        return matrix_OX[self.first_row :: self.step][: self.rows]


class Packing:
    """Packability of the parameters of a model's blocks, by their full names in the calibrated model.

    `weights`: the checkpoint as named by that model; `loaded_as`: as named by the class in the config's
    `architectures`. `initialised`: names of linears, in either, that `linears_needed_by_init` returned.
    """

    def __init__(self, weights: Weights, loaded_as: Weights, initialised: set[str]) -> None:
        self._weights = weights
        self._rules = [_Rules(each) for each in dict.fromkeys((weights, loaded_as))]
        self._initialised = initialised
        modules = (module for each in (weights, loaded_as) for module in each.model.modules())
        self._is_rebuilt = any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in modules)
        self._linears: dict[str, tuple[PackedLinear, ...] | str] = {}

    def why_dense(self, parameter: str) -> str:
        """Return the reason why a parameter is not stored packed, or an empty string if it is."""
        found = self._found(parameter)
        return found if isinstance(found, str) else ""

    def linears(self, parameter: str) -> tuple[PackedLinear, ...]:
        """Return the packed linears that store a parameter. Raises `ModelError` if it cannot be packed."""
        found = self._found(parameter)
        if isinstance(found, str):
            raise ModelError("this matrix cannot be written packed", where=parameter, got=found)
        return found

    def _found(self, parameter: str) -> tuple[PackedLinear, ...] | str:
        if parameter not in self._linears:
            self._linears[parameter] = self._find(parameter)
        return self._linears[parameter]

    def _find(self, parameter: str) -> tuple[PackedLinear, ...] | str:
        if self._is_rebuilt:
            return REBUILT
        name, _, kind = parameter.rpartition(".")
        module = self._weights.model.get_submodule(name)
        if experts.is_experts(module) and module.get_parameter(kind).ndim == 3:
            return tuple(self._of_stack(parameter, transposed=bool(module.is_transposed))) or FUSED
        if isinstance(module, Conv1D):
            return TRANSPOSED
        if not isinstance(module, nn.Linear) or kind != "weight":
            return RENAMED
        theirs = self._weights.linear_of(parameter)
        if name in self._initialised or any(rules.module_of(theirs) in self._initialised for rules in self._rules):
            return INITIALISED
        if type(module).forward is not nn.Linear.forward:
            return SPECIAL
        spelled = next((one for one in (theirs, name) if all(rules.hold_linear(one) for rules in self._rules)), None)
        return (PackedLinear(spelled, None, 0, module.out_features),) if spelled else RENAMED

    def _of_stack(self, parameter: str, *, transposed: bool) -> Iterator[PackedLinear]:
        """Apply transformers' own inverse conversion to row numbers instead of weights: the result shows which rows of
        which expert each linear of the hub checkpoint holds. Yields nothing if any of them cannot be packed."""
        stack = self._weights.model.get_parameter(parameter)
        outputs = stack.shape[2 if transposed else 1]
        numbers_EO2 = torch.arange(stack.shape[0] * outputs * 2, dtype=torch.int32).view(stack.shape[0], outputs, 2)
        stored = numbers_EO2.mT if transposed else numbers_EO2
        found = [_rows(key, part, outputs) for key, part in self._weights.split_stack(parameter, stored).items()]
        linears = [one for one in found if one is not None]
        is_whole = len(linears) == len(found) and sum(one.rows for one in linears) == stack.shape[0] * outputs
        if is_whole and all(rules.hold_expert(one.name) for one in linears for rules in self._rules):
            yield from linears


def _rows(key: str, part: Tensor, outputs: int) -> PackedLinear | None:
    """Decode a tensor of row numbers; None if it is not a matrix of whole, evenly spaced rows of one expert."""
    if part.ndim != 2 or part.shape[1] != 2 or not key.endswith(".weight"):
        return None
    row_O = part[:, 0].long() // 2
    first, step = int(row_O[0]), int(row_O[1] - row_O[0]) if len(row_O) > 1 else 1
    expert = first // outputs
    is_regular = step > 0 and torch.equal(row_O, first + step * torch.arange(len(row_O)))
    if not is_regular or int(row_O[-1]) // outputs != expert or not torch.equal(part[:, 1], part[:, 0] + 1):
        return None
    return PackedLinear(key.removesuffix(".weight"), expert, first % outputs, len(row_O), step)


class _Rules:
    """Maps the packed parts of linears to modules, as one model class loads a quantized checkpoint."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._naming = weights, Naming(weights.model, packed=True)

    def module_of(self, linear: str) -> str:
        return self._weights.target_of(f"{linear}.weight").removesuffix(".weight")

    def hold_linear(self, spelled: str) -> bool:
        """Whether the packed parts of this linear of the checkpoint map to one module without a conversion."""
        places = [self._naming.place(f"{spelled}.{part}") for part in PACKED]
        module = places[0][0].rpartition(".")[0]
        return f"{module}.weight" in self._naming.expected and places == [(f"{module}.{p}", None) for p in PACKED]

    def hold_expert(self, spelled: str) -> bool:
        """Whether the packed parts of this expert's linear map to one stack, through a conversion."""
        places = [self._naming.place(f"{spelled}.{part}") for part in PACKED]
        stacks = {name for name, _ in places}
        return len(stacks) == 1 and stacks.pop() in self._naming.expected and all(pattern for _, pattern in places)


def linears_needed_by_init(model: PreTrainedModel) -> set[str]:
    """Return the names of linears whose `weight` transformers accesses when it initialises a model. Destructive:
    `model`, on the meta device, is unusable afterwards.

    `from_pretrained` initialises every module, loaded or not, and relies on flags on the tensors to skip loaded ones.
    A packed linear has no `weight` that could carry the flag.
    """
    linears = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {linear: linear._parameters.pop("weight") for linear in linears}
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    touched: set[str] = set()
    with ONE_AT_A_TIME, torch.no_grad():
        for name, module in model.named_modules():
            while (linear := _missed(owner_of(name, owners), module)) is not None:
                linear._parameters["weight"] = weights[linear]
                touched.add(linears[linear])
    return touched


def _missed(owner: PreTrainedModel, module: nn.Module) -> nn.Linear | None:
    """Return the linear whose missing weight makes the initialisation of a module fail, or None."""
    try:
        owner._init_weights(module)
    except AttributeError as error:
        if error.name == "weight" and isinstance(error.obj, nn.Linear) and "weight" not in error.obj._parameters:
            return error.obj
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # not because of a missing weight: these tensors have no storage, unlike when loading
    return None
