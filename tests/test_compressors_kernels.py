"""The panel kernels against plain torch. Triton's kernel is compiled on a GPU and interpreted elsewhere."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from crosscal.compressors import GPTQ, LayerProblem, SparseGPT, SparseGPTQ, Sparsity, solve_many
from crosscal.compressors.numba_panel import fix_panel_numba
from crosscal.compressors.panel import FixedPanel, NMPattern, Panel, Rounding, fix_panel_torch
from tests.helpers.interpreted import interpreted_kernel
from tests.helpers.problems import layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Kernel = Callable[[Panel], FixedPanel]


HAS_TRITON = sys.platform == "linux" and platform.machine() == "x86_64"  # the extra `dev` installs it there


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not made for this machine")


@pytest.fixture(scope="module", params=["numba", pytest.param("triton", marks=needs_triton)])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    if request.param == "numba":
        yield lambda asked: moved(fix_panel_numba(moved(asked, "cpu")))
    elif DEVICE == "cuda":
        from crosscal.compressors.triton_panel import fix_panel_triton

        yield fix_panel_triton
    else:
        with interpreted_kernel() as interpreted:
            yield interpreted


def panel(columns: int, rows: int, **settings: Any) -> Panel:
    generator = torch.Generator().manual_seed(columns * rows)
    weight_CR = torch.randn(columns, rows + 3, generator=generator)[:, :rows]
    weight_CR[:, 1] = weight_CR[:, 0].abs().round()  # ties
    root_CC = torch.randn(columns, columns, generator=generator).triu(1) * 0.2 + torch.diag(
        0.5 + torch.rand(columns, generator=generator)
    )
    upper_CC = torch.linalg.inv(root_CC).contiguous()
    pivot_C = root_CC.diagonal().clone()
    pivot_C[columns // 2] = 0.0
    asked = Panel(weight_CR, upper_CC, root_CC.diagonal(), pivot_C, **settings)
    return moved(asked)


def moved(value: Any, device: str = DEVICE) -> Any:
    """Return a tensor, or a dataclass with its tensors, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Panel | Rounding | FixedPanel):
        return type(value)(**{name: moved(part, device) for name, part in vars(value).items()})
    return value


def drops(columns: int, rows: int) -> torch.Tensor:
    return (torch.rand(columns, rows, generator=torch.Generator().manual_seed(3)) < 0.4).float()


def rounding(columns: int, rows: int, stored_dtype: torch.dtype | None) -> Rounding:
    scale_CR = 0.1 + torch.rand(columns, rows, generator=torch.Generator().manual_seed(4))
    bits_R = torch.tensor([2.0, 4.0, 8.0])[torch.arange(rows) % 3]
    return Rounding(scale_CR, bits_R, stored_dtype)


def extreme_rounding(columns: int, rows: int) -> Rounding:
    """Scales from 2⁻²⁴, far below the least normal float16, to 2⁸, where 8-bit levels still fit in float16."""
    scale_CR = (torch.rand(columns, rows, generator=torch.Generator().manual_seed(5)) * 32 - 24).exp2()
    return Rounding(scale_CR, torch.full((rows,), 8.0), torch.float16)


PATTERNS = [NMPattern(slice(10, 40), 2, 4), NMPattern(slice(40, 75), 1, 8)]
CASES = {
    "fraction": (32, 150, {"drop_CR": drops(32, 150)}),
    "narrow": (7, 70, {"drop_CR": drops(7, 70)}),
    "patterns beside fractions": (32, 90, {"drop_CR": drops(32, 90), "patterns": PATTERNS}),
    "patterns in a narrow panel": (24, 75, {"drop_CR": drops(24, 75), "patterns": PATTERNS}),
    "grid": (32, 90, {"rounding": rounding(32, 90, None)}),
    "grid stored as bfloat16": (32, 66, {"rounding": rounding(32, 66, torch.bfloat16)}),
    "grid stored as float16": (16, 66, {"rounding": rounding(16, 66, torch.float16)}),
    "both": (
        32,
        90,
        {"drop_CR": drops(32, 90), "patterns": PATTERNS, "rounding": rounding(32, 90, torch.bfloat16)},
    ),
    "float16 at its ends": (8, 40, {"rounding": extreme_rounding(8, 40)}),
    "neither": (32, 20, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_torch_reference(kernel: Kernel, case: str) -> None:
    columns, rows, settings = CASES[case]
    asked = panel(columns, rows, **settings)
    before_CR = asked.weight_CR.clone()
    expected, found = fix_panel_torch(asked), kernel(asked)
    assert torch.equal(asked.weight_CR, before_CR)
    assert torch.equal(found.weight_CR == 0, expected.weight_CR == 0)
    torch.testing.assert_close(found.weight_CR, expected.weight_CR, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.error_CR, expected.error_CR, rtol=1e-5, atol=1e-5)
    if expected.drop_CR is None:
        assert found.drop_CR is None
    else:
        assert asked.drop_CR is not None
        assert found.drop_CR is not None
        assert torch.equal(found.drop_CR, expected.drop_CR)
        assert (found.drop_CR >= asked.drop_CR).all()
        assert not found.weight_CR[found.drop_CR > 0].any()
    if expected.ints_CR is None:
        assert found.ints_CR is None
    else:
        assert found.ints_CR is not None
        assert torch.equal(found.ints_CR, expected.ints_CR)


@needs_triton
def test_the_interpreted_kernel_is_tried_whatever_was_imported_before() -> None:
    importlib.import_module("triton")  # here it is set to compile, not to interpret
    asked = panel(7, 70, drop_CR=drops(7, 70))
    with interpreted_kernel() as kernel:
        torch.testing.assert_close(kernel(moved(asked, "cpu")).weight_CR, fix_panel_torch(asked).weight_CR.cpu())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [3, 1024, 1025, 5000])
def test_threads_change_no_bit(case: str, rows: int) -> None:
    """Rows are divided among threads; each is computed independently."""
    columns, _, settings = CASES[case]
    asked = moved(panel(columns, rows, **widened(settings, columns, rows)), "cpu")
    one = with_threads(1, asked)
    for threads in (2, 8, 16):
        found = with_threads(threads, asked)
        for name, part in vars(one).items():
            assert part is None or torch.equal(part, getattr(found, name)), f"{name}, {threads} threads"


def widened(settings: dict[str, Any], columns: int, rows: int) -> dict[str, Any]:
    """Return a case's settings for another number of rows."""
    made: dict[str, Any] = {}
    if "drop_CR" in settings:
        made["drop_CR"] = drops(columns, rows)
    if "patterns" in settings:
        third = rows // 3
        made["patterns"] = [NMPattern(slice(third, 2 * third), 2, 4), NMPattern(slice(2 * third, rows), 1, 8)]
    if "rounding" in settings:
        made["rounding"] = rounding(columns, rows, settings["rounding"].stored_dtype)
    return made


def with_threads(threads: int, asked: Panel) -> FixedPanel:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return fix_panel_numba(asked)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_a_gpu_solves_as_a_cpu_does() -> None:
    settings = [*(SparseGPT(Sparsity.parse(s)) for s in (0.3, 0.5, "2:4", "4:8")), GPTQ(4, 32)]
    settings.append(SparseGPTQ(Sparsity.parse(0.5), 4, 32))
    own = layer(96, 288, dtype=torch.float32)
    there = LayerProblem(own.name, own.weight_OI.cuda(), own.hessian_II.cuda())
    for (cpu,), (gpu,) in zip(solve_many([own], settings), solve_many([there], settings), strict=True):
        assert gpu.weight_OI.is_cuda
        assert ((gpu.weight_OI.cpu() == 0) == (cpu.weight_OI == 0)).double().mean() > 0.99
        assert gpu.loss == pytest.approx(cpu.loss, rel=1e-2)
