"""Exactly the requested number of weights is pruned, and the choice is deterministic."""

from __future__ import annotations

import pytest
import torch

from crosscal.compressors import Compressor, Magnitude, SparseGPT, Sparsity, Wanda
from crosscal.compressors.selection import WORTH_SAMPLING, lowest, lowest_of_group, lowest_per_row
from crosscal.errors import UsageError
from tests.helpers.problems import layer


@pytest.mark.parametrize(
    ("value", "fraction", "text"),
    [
        (0, 0.0, "0"),
        (1, 1.0, "1"),
        (0.5, 0.5, "0.5"),
        (0.3, 0.3, "0.3"),
        ("2:4", 0.5, "2:4"),
        (" 4:8 ", 0.5, "4:8"),
        ("0:4", 1.0, "0:4"),
        ("4:4", 0.0, "4:4"),
        ("1:4", 0.75, "1:4"),
    ],
)
def test_parse(value: float | str, fraction: float, text: str) -> None:
    sparsity = Sparsity.parse(value)
    assert sparsity.fraction == fraction
    assert str(sparsity) == text
    assert Sparsity.parse(sparsity) is sparsity
    assert Sparsity.parse(text if sparsity.group else float(text)) == sparsity


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, 50, float("nan"), float("inf"), "0.5", "", "5:4", "0:0", "2:", "-2:4", "a:b", None, True, [0.5]],
)
def test_parse_refuses(value: object) -> None:
    with pytest.raises(UsageError, match="not a sparsity"):
        Sparsity.parse(value)  # pyright: ignore[reportArgumentType]


def test_a_pattern_is_not_its_fraction() -> None:
    assert Sparsity.parse("2:4") != Sparsity.parse(0.5)


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_exact_and_the_lowest_go(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = (int(n) for n in torch.randint(1, 40, (2,), generator=generator))
    score_OI = torch.randint(0, 30, (outputs, inputs), generator=generator).double()  # many ties
    sparsity = Sparsity.parse(float(torch.rand((), generator=generator)))
    keep_OI = sparsity.keep_OI(score_OI, per="matrix")
    assert int((~keep_OI).sum()) == round(sparsity.fraction * outputs * inputs)
    if keep_OI.any() and not keep_OI.all():
        assert score_OI[~keep_OI].max() <= score_OI[keep_OI].min()
    keep_OI = sparsity.keep_OI(score_OI, per="row")
    assert (~keep_OI).sum(1).tolist() == [round(sparsity.fraction * inputs)] * outputs
    for pivot_I, keep_I in zip(score_OI, keep_OI, strict=True):
        if keep_I.any() and not keep_I.all():
            assert pivot_I[~keep_I].max() <= pivot_I[keep_I].min()


@pytest.mark.parametrize("seed", range(6))
def test_among_equals_the_earlier_goes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_RC = torch.randint(0, 4, (5, 13), generator=generator).float()
    count = int(torch.randint(0, 66, (), generator=generator))
    expected = sorted(range(65), key=lambda place: (float(score_RC.flatten()[place]), place))[:count]
    assert lowest(score_RC, count).flatten().nonzero().flatten().tolist() == sorted(expected)
    per_row = count % 14
    for row, chosen_C in zip(score_RC.tolist(), lowest_per_row(score_RC, per_row), strict=True):
        expected = sorted(range(13), key=lambda place: (row[place], place))[:per_row]
        assert chosen_C.nonzero().flatten().tolist() == sorted(expected)


def test_constant_scores_go_in_order() -> None:
    score_OI = torch.ones(2, 4)
    assert Sparsity.parse(0.5).keep_OI(score_OI, per="matrix").tolist() == [[False] * 4, [True] * 4]
    assert Sparsity.parse(0.5).keep_OI(score_OI, per="row").tolist() == [[False, False, True, True]] * 2
    assert Sparsity.parse("1:2").keep_OI(score_OI, per="matrix").tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
@pytest.mark.parametrize("pattern", ["0:4", "1:4", "2:4", "4:4", "4:8"])
@pytest.mark.parametrize("inputs", [8, 136, 264])
def test_every_group_keeps_its_n(method: type, pattern: str, inputs: int) -> None:
    kept, group = (int(n) for n in pattern.split(":"))
    problem = layer(6, inputs, seed=inputs)
    solution = method(pattern).compress(problem)
    assert ((solution.weight_OI != 0).reshape(6, -1, group).sum(2) == kept).all()
    assert solution.sparsity == 1 - kept / group


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_patterns_need_whole_groups(method: type) -> None:
    with pytest.raises(UsageError, match=r"blocks\.0\.linear: .*divisible by 4 \(got 10\)"):
        method("2:4").compress(layer(3, 10))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (5, 128), (7, 129), (6, 300)])
def test_every_method_removes_the_exact_number(fraction: float, outputs: int, inputs: int) -> None:
    problem = layer(outputs, inputs, seed=inputs)
    whole, row = round(fraction * outputs * inputs), outputs * round(fraction * inputs)
    expected: list[tuple[Compressor, int]] = [
        (Magnitude(Sparsity.parse(fraction)), whole),
        (SparseGPT(Sparsity.parse(fraction)), whole),
        (Wanda(Sparsity.parse(fraction)), row),
    ]
    for compressor, zeros in expected:
        assert int((compressor.compress(problem).weight_OI == 0).sum()) == zeros, compressor


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_dead_inputs_go_first_and_inside_the_budget(sparsity: float | str, scattered: bool) -> None:
    """60 % of the inputs (75 % for scattered 2:4) are dead and have the largest weights; exactly 50 % is pruned.

    If every group that shares a threshold has enough dead inputs, only these are pruned; otherwise live ones too."""
    inputs, group = 240, 10 if sparsity == 0.5 else 4
    dead = [i for i in range(inputs) if i % group < (6 if sparsity == 0.5 else 3)]
    if not scattered:
        dead = list(range(int(0.6 * inputs)))
    problem = layer(8, inputs, seed=9, dead=dead)
    problem.weight_OI[:, dead] *= 100
    alive = [i for i in range(inputs) if i not in dead]
    for compressor in (SparseGPT(Sparsity.parse(sparsity)), Wanda(Sparsity.parse(sparsity))):
        solution = compressor.compress(problem)
        assert int((solution.weight_OI == 0).sum()) == 8 * inputs // 2
        if scattered or (isinstance(compressor, Wanda) and sparsity == 0.5):
            assert (solution.weight_OI[:, alive] != 0).all()
            assert torch.equal(solution.weight_OI[:, alive], problem.weight_OI[:, alive])
            assert solution.loss == 0.0


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_ranking_a_group_by_pairs_is_sorting_it(size: int) -> None:
    score_MR = torch.randint(0, 4, (size, 200), generator=torch.Generator().manual_seed(size)).float()
    order_MR = score_MR.argsort(dim=0, stable=True)
    for count in range(size + 1):
        expected_MR = torch.zeros_like(score_MR, dtype=torch.bool).scatter_(0, order_MR[:count], True)
        assert torch.equal(lowest_of_group(score_MR, count), expected_MR)


@pytest.mark.parametrize("kind", ["squares", "ties", "ascending", "one step"])
def test_a_threshold_between_two_bounds_is_the_one_of_sorting(kind: str) -> None:
    """Also if the sample is unrepresentative: the search then covers all scores."""
    scores, generator = WORTH_SAMPLING + 37, torch.Generator().manual_seed(1)
    score_N = {
        "squares": torch.randn(scores, generator=generator).square(),
        "ties": torch.randint(0, 3, (scores,), generator=generator).float(),
        "ascending": torch.arange(scores).float(),
        "one step": (torch.arange(scores) % 64 == 0).float(),  # the sample contains only the rare value
    }[kind]
    order_N = score_N.argsort(stable=True)
    for count in (0, 1, 2, 100, scores // 3, scores // 2, scores - 2, scores - 1, scores):
        assert torch.equal(lowest(score_N, count).nonzero().flatten(), order_N[:count].sort().values)
