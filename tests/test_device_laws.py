"""Statistics and methods on a simulated GPU: no mix of devices, results on the right device and equal to the CPU's.

See `tests/helpers/pretend_device.py` for what it detects and what needs a real GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from crosscal.compressors import ALLOCATE, COMPRESSORS, EoRA, Magnitude, RoundToNearest, run, solve_many
from crosscal.compressors.kernels import TRITON_SWITCH
from crosscal.compressors.kernels import _fastest as fastest
from crosscal.compressors.panel import fix_panel_torch
from crosscal.compressors.problem import solved
from crosscal.compressors.recipe import site_of
from crosscal.errors import UsageError
from crosscal.statistics import EVERY, InputMoments, MeanSum, Mixture, MomentsAccumulator, Statistic, factor
from crosscal.statistics.factor import eigensystem
from tests.helpers.pretend_device import assert_same, devices_of, on_device, pretended_cuda
from tests.helpers.pretended_tensor import DeviceMix, Seen
from tests.helpers.problems import correlated_inputs_TI, label, layer
from tests.test_compressors_laws import CASES
from tests.test_compressors_recipes import REFINEMENTS
from tests.test_compressors_stacked import SETTINGS, layers

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device: see the tests marked `gpu`")
ROUNDOFF_F32 = 2e-4
STEPS = [*CASES, *(case for case in REFINEMENTS if case not in CASES)]
FIRST = {name: next(case for case in CASES if type(case) is method) for name, method in COMPRESSORS.items()}
STARTS = {"pruned": [Magnitude(0.3), EoRA(2)], "on a grid": [Magnitude(0.3), RoundToNearest(4, 32), EoRA(2)]}
"""Steps before the one under test, so that it gets a layer with a mask, a low-rank part and a grid."""


@pytest.fixture(scope="module", autouse=True)
def seen() -> Iterator[Seen]:
    with pretended_cuda() as device:
        yield device


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=label)
def test_moments_are_summed_on_the_device_and_handed_out_on_the_cpu(dtype: torch.dtype) -> None:
    input_TI = correlated_inputs_TI(70, 200, seed=3).to(dtype)
    sums_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mine, theirs = (MomentsAccumulator(200, dtype=sums_dtype, device=device) for device in ("cuda", "cpu"))
    for batch_TI in input_TI.split(30):
        mine.add(batch_TI.to("cuda"))
        theirs.add(batch_TI)
    so_far = mine.moments()
    assert_same(so_far, theirs.moments(), "cpu", ROUNDOFF_F32)
    with pytest.raises(DeviceMix):
        mine.add(input_TI)
    assert_same(mine.finish(), so_far, "cpu")
    assert_same(InputMoments.of(input_TI.to("cuda")), so_far, "cpu", ROUNDOFF_F32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=label)
def test_pairs_are_summed_on_the_device_and_handed_out_on_the_cpu(dtype: torch.dtype) -> None:
    dense_TI, input_TI = (correlated_inputs_TI(70, 200, seed=seed).to(dtype) for seed in (3, 4))
    sums_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mine, theirs = (
        MomentsAccumulator(200, dtype=sums_dtype, device=device, wanted=tuple(Statistic)) for device in ("cuda", "cpu")
    )
    with pytest.raises(DeviceMix):
        MomentsAccumulator(200, dtype=sums_dtype, device="cuda", wanted=tuple(Statistic)).add(
            input_TI.to("cuda"), dense_TI
        )
    mine.add(input_TI.to("cuda"), dense_TI.to("cuda"))
    theirs.add(input_TI, dense_TI)
    assert_same(mine.finish(), theirs.finish(), "cpu", ROUNDOFF_F32)


def test_hessians_are_mixed_and_factored_where_they_are() -> None:
    inputs = [correlated_inputs_TI(80, 24, seed=seed, dead=[5]) for seed in (1, 2)]
    here = {name: InputMoments.of(input_TI) for name, input_TI in zip(("general", "legal"), inputs, strict=True)}
    there = on_device(here)
    mixture = Mixture.of({"general": 0.25, "legal": 0.75})
    for normalised in (False, True):
        mixed_II = mixture.hessian_II(there, trace_normalised=normalised)
        assert_same(mixed_II, mixture.hessian_II(here, trace_normalised=normalised))
    assert_same(mixture.mean_abs_I(there), mixture.mean_abs_I(here))
    sums = [MeanSum(EVERY) for _ in range(2)]
    for total, moments in zip(sums, (there, here), strict=True):
        for each in moments.values():
            total.add(each, 0.7)
        total.finish()
    means = sums[1].means()
    assert_same(sums[0].means(), means)
    of_corpora = {"general": means, "legal": {which: 3 * mean for which, mean in means.items()}}
    assert_same(
        mixture.mix(on_device(of_corpora), trace_normalised=True), mixture.mix(of_corpora, trace_normalised=True)
    )
    hessian_II = means[Statistic.GRAM]
    for damping in (0.0, 0.01):
        mine, theirs = factor(hessian_II.to("cuda"), damping), factor(hessian_II, damping)
        assert_same([mine, mine.upper_II], [theirs, theirs.upper_II])
    assert_same(eigensystem(hessian_II.to("cuda")), eigensystem(hessian_II))


def recipes_of(case: Any) -> list[list[Any]]:
    """The step alone and, for one case of each method and every refinement, after others; allocators come first."""
    if case.kind == ALLOCATE:
        return [[case, FIRST["wanda"]]]
    if case.kind == "correct":
        return [[case], [case, FIRST["gptq"]]]
    if case.kind in ("refine", "repair"):
        return [[case], *([*start, case] for start in STARTS.values())]
    return [[case], [*STARTS["pruned"], case]] if case in FIRST.values() else [[case]]


@pytest.mark.parametrize("case", STEPS, ids=label)
def test_every_method_on_the_device(case: Any, seen: Seen) -> None:
    """In float64, alone and after other steps, with at most about one wait for the device per iteration."""
    own = layer(8, 160, dead=[3, 44], stored_dtype=torch.bfloat16)
    there = on_device(own)
    for recipe in recipes_of(case):
        here_layer = run(site_of([own]), recipe).layers[0]
        seen.clear()
        there_layer = run(site_of([there]), recipe).layers[0]
        assert sum(seen.waits.values()) <= most_waits(recipe), seen.waits
        assert_same(there_layer, here_layer)
        mine, theirs = solved(there, there_layer), solved(own, here_layer)
        assert_same(mine, theirs)
        assert (mine.loss, mine.sparsity) == (theirs.loss, theirs.sparsity)


def most_waits(recipe: Sequence[Any]) -> int:
    """Return the maximum of waits: 12 per step for checks, factors and thresholds, and 4/3 per iteration."""
    rounds = [getattr(step, "iterations", getattr(step, "rounds", 0)) or 0 for step in recipe]
    return sum(12 + 4 * each // 3 for each in rounds)


@pytest.mark.parametrize("case", FIRST.values(), ids=label)
def test_every_method_in_the_precision_that_a_gpu_solves_in(case: Any) -> None:
    """A CPU uses other kernels for float32, so roundoff may differ."""
    own = layer(8, 160, dtype=torch.float32)
    mine, theirs = case.compress(on_device(own)), case.compress(own)
    assert devices_of(mine) == {"cuda:0"}
    assert mine.sparsity == pytest.approx(theirs.sparsity, abs=5e-3)
    assert mine.loss == pytest.approx(theirs.loss, rel=2e-2, abs=1e-6)


def test_a_stack_on_the_device() -> None:
    here = layers((torch.bfloat16, None, torch.bfloat16))
    hessian_II = here[0].hessian_II.to("cuda")
    there = [dataclasses.replace(each, weight_OI=each.weight_OI.to("cuda"), hessian_II=hessian_II) for each in here]
    stacked = [step for step in SETTINGS if hasattr(step, "stack_key")][::3]
    assert_same(solve_many(there, stacked), solve_many(here, stacked))


def test_a_problem_on_two_devices_is_refused() -> None:
    own = layer(8, 32)
    mixed = dataclasses.replace(own, hessian_II=own.hessian_II.to("cuda"))
    for case in FIRST.values():
        with pytest.raises(DeviceMix):
            case.compress(mixed)


def test_the_kernel_that_no_gpu_has_run_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRITON_SWITCH, raising=False)
    assert fastest("cuda", torch.float32) is fix_panel_torch
    monkeypatch.setenv(TRITON_SWITCH, "0")
    assert fastest("cuda", torch.float32) is fix_panel_torch
    if importlib.util.find_spec("triton"):
        monkeypatch.setenv(TRITON_SWITCH, "1")
        assert fastest("cuda", torch.float32).__name__ == "fix_panel_triton"
    for wrong in ("yes", "2"):
        monkeypatch.setenv(TRITON_SWITCH, wrong)
        with pytest.raises(UsageError, match="CROSSCAL_TRITON"):
            fastest("cuda", torch.float32)
        assert fastest("cpu", torch.float64) is fix_panel_torch
