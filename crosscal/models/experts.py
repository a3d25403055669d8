"""Fused mixture-of-experts modules: two three-dimensional parameters hold all experts of a layer, stacked.

Shapes: T tokens, H hidden size, F inner size of an expert, E experts, K experts chosen per token.

transformers marks every such module with the layout of its weights (`is_transposed`, `has_bias`, `has_gate`). From
these marks an expert's two inputs are recomputed, only for the tokens that the router sent to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether this module stacks its experts and carries transformers' layout marks."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return all(hasattr(module, mark) for mark in _MARKS) and {up_name(module), "down_proj"} <= names


def up_name(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def count(module: nn.Module) -> int:
    return module.get_parameter("down_proj").shape[0]


def routed_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, input_TH of its up projection, input_TF of its down projection) for experts with any token."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    hidden, chosen = list(bound.arguments.values())[1:3]
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    chosen_TK = chosen.reshape(hidden_TH.shape[0], -1)
    for expert in torch.unique(chosen_TK).tolist():
        if 0 <= expert < count(module):
            input_TH = hidden_TH[(chosen_TK == expert).any(-1)]
            yield expert, input_TH, _inner(module, expert, input_TH)


def _inner(module: nn.Module, expert: int, input_TH: Tensor) -> Tensor:
    weight = module.get_parameter(up_name(module))[expert]
    bias = module.get_parameter(f"{up_name(module)}_bias")[expert] if module.has_bias else None
    projected = functional.linear(input_TH, weight.mT if module.is_transposed else weight, bias)
    return module._apply_gate(projected) if module.has_gate else module.act_fn(projected)  # type: ignore[operator]
