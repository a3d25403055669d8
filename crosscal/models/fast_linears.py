"""Run linears with oneDNN on a CPU, with weights reordered for it once per block.

torch multiplies float32 with MKL, which uses narrower instructions on non-Intel processors: on an AMD EPYC oneDNN's
product is 8 to 15 % faster, and a whole calibration pass 7 %. The results differ in roundoff.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def fast_linears(block: nn.Module, *, tokens: int) -> Iterator[None]:
    """Context: oneDNN computes the float32 linears of a block on a CPU. `tokens`: the expected batch size, for which
    the weights are reordered. Changes of the weights inside the context have no effect."""
    linears = [module for module in block.modules() if type(module) is nn.Linear and _is_fit(module.weight)]
    for linear in linears:
        setattr(linear, "forward", _by_onednn(linear, tokens))  # noqa: B010  (a plain assignment would not type-check)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward  # uncovers the class's own method


def _is_fit(weight: Tensor) -> bool:
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and weight.device.type == "cpu" and weight.dtype == torch.float32


def _by_onednn(linear: nn.Linear, tokens: int) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), tokens)
    plain = linear.forward

    def forward(input: Tensor) -> Tensor:
        if input.dtype != torch.float32 or not input.numel():
            return plain(input)
        return torch.ops.mkldnn._linear_pointwise(input, weight, linear.bias, "none", [], "")

    return forward
