"""oneDNN's linears equal torch's to roundoff, and replace them only while they are enabled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosscal.models.fast_linears import fast_linears


def block(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.SiLU(), nn.Linear(160, 40, bias=False)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 96), (3, 7, 96), (512, 96)])
def test_the_same_to_roundoff(shape: tuple[int, ...]) -> None:
    linears, input_TI = block(), torch.randn(shape)
    exact = block(torch.float64)(input_TI.double())
    with torch.no_grad(), fast_linears(linears, tokens=512):
        torch.testing.assert_close(linears(input_TI).double(), exact, rtol=1e-4, atol=1e-5)


def test_weights_are_read_when_entered_and_forwards_are_the_classes_own_afterwards() -> None:
    linears, input_TI = block(), torch.randn(5, 96)
    for factor in (1.0, 2.0):
        with torch.no_grad():
            linears[2].weight.mul_(factor)
            plain = linears(input_TI)
            with fast_linears(linears, tokens=5):
                torch.testing.assert_close(linears(input_TI), plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError), fast_linears(linears, tokens=5):
        raise KeyError
    assert all("forward" not in vars(module) for module in linears)


def test_what_is_not_for_onednn_stays_as_it_is() -> None:
    class Special(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    special, double = Special(8, 8), nn.Linear(8, 8, dtype=torch.float64)
    with fast_linears(nn.ModuleList([special, double]), tokens=4):
        assert "forward" not in vars(special) | vars(double)
    linear = nn.Linear(8, 8)
    with torch.no_grad(), fast_linears(linear, tokens=4):
        assert linear(torch.empty(0, 8)).shape == (0, 8)
