"""Matrices that a block multiplies by without a linear: found, distinguished, and measured by their products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from crosscal.errors import UnsupportedModel
from crosscal.models import Matrices, find_matrices
from crosscal.models.capture import capture
from crosscal.models.finding import ROUTER
from crosscal.models.passes import OrderedSums
from crosscal.statistics.moments import MomentsAccumulator

INPUTS = EXPERTS = 24
"""Equal, so that no size distinguishes a router from another matrix."""
OUTPUTS, TOKENS = 32, 120


class Bare(nn.Module):
    """One parameter, used in one of the ways that models do; it may be square."""

    def __init__(self, use: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.use = use
        as_IO = (EXPERTS, inputs, outputs)
        shapes = {
            "x @ w_IO": as_IO[1:],
            "stack_IO": as_IO,
            "bmm": as_IO,
            "weighed": as_IO,
            "stack_OI": (EXPERTS, outputs, inputs),
        }
        shapes |= {"rows_OI": (EXPERTS * outputs, inputs), "rows_IO": (EXPERTS * inputs, outputs)}
        self.weight = nn.Parameter(torch.randn(shapes.get(use, (outputs, inputs))))
        self.before = nn.Linear(inputs, inputs, bias=False)
        self.router = nn.Linear(inputs, EXPERTS if use in STACKS else 1, bias=False)
        self.seen: dict[int | None, tuple[Tensor, Tensor]] = {}
        """Expert -> its input and output."""

    def forward(self, x_TI: Tensor) -> Tensor:
        x_TI = x_TI + self.before(x_TI)  # affects the choice, but the inputs as well: no router
        simple: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: nn.functional.linear(x_TI, self.weight),
            "x @ w_OI.T": lambda: x_TI @ self.weight.T,
            "w_OI @ x.T": lambda: (self.weight @ x_TI.T).T,
            "w_OI @ batches": lambda: (self.weight @ x_TI.view(4, -1, x_TI.shape[1]).mT).mT.reshape(len(x_TI), -1),
            "einsum": lambda: torch.einsum("ti,oi->to", x_TI, self.weight),
            "x @ w_IO": lambda: x_TI @ self.weight,
        }
        if self.use in simple:
            self.seen[None] = x_TI, simple[self.use]()
            return self.seen[None][1]
        weight_T, chosen_T = self.router(x_TI).softmax(-1)[:, :-1].max(-1)  # the last expert gets nothing
        if self.use in ("bmm", "weighed"):  # every token to every expert, those not chosen as zeros
            part_TE = nn.functional.one_hot(chosen_T, EXPERTS).to(x_TI)
            if self.use == "weighed":  # inputs scaled by the routing weight
                part_TE = torch.zeros_like(part_TE).scatter(1, chosen_T[:, None], weight_T[:, None])
            given_ETI = x_TI * part_TE.T[..., None]
            output_ETO = torch.bmm(given_ETI, self.weight)
            self.seen = {expert: (given_ETI[expert], output_ETO[expert]) for expert in range(EXPERTS)}
            return output_ETO.sum(0) * weight_T[:, None]
        stack = self.weight.unflatten(0, (EXPERTS, -1)) if self.use.startswith("rows") else self.weight
        stack_EIO = stack if self.use.endswith("IO") else stack.mT
        output_TO = x_TI.new_zeros(len(x_TI), stack_EIO.shape[-1])
        for expert in chosen_T.unique():
            mine_T = torch.where(chosen_T == expert)[0]
            made_TO = x_TI[mine_T] @ stack_EIO[expert]
            self.seen[int(expert)] = x_TI[mine_T], made_TO
            output_TO = output_TO.index_add(0, mine_T, made_TO * weight_T[mine_T, None])
        return output_TO


ONE = ["linear", "x @ w_OI.T", "w_OI @ x.T", "w_OI @ batches", "einsum", "x @ w_IO"]
STACKS = ["bmm", "weighed", "stack_IO", "stack_OI", "rows_OI", "rows_IO"]


def looked_at(use: str, inputs: int, outputs: int) -> tuple[Bare, Tensor, Matrices]:
    torch.manual_seed(0)
    block, x_TI = Bare(use, inputs, outputs).double(), torch.randn(TOKENS, inputs, dtype=torch.float64)
    with torch.no_grad():
        found = find_matrices(block, lambda: block(x_TI))
    return block, x_TI, found


@pytest.mark.parametrize(("inputs", "outputs"), [(INPUTS, OUTPUTS), (OUTPUTS, OUTPUTS)], ids=["oblong", "square"])
@pytest.mark.parametrize("use", [*ONE, *STACKS])
def test_each_matrix_has_the_moments_of_its_own_input(use: str, inputs: int, outputs: int) -> None:
    block, x_TI, found = looked_at(use, inputs, outputs)
    assert found.sites[0].name == "before"
    sites = {site.matrices[0].expert: site for site in found.sites if not site.matrices[0].is_called}
    assert list(sites) == ([None] if use in ONE else list(range(EXPERTS)))
    sums = {site.name: MomentsAccumulator(site.inputs, dtype=torch.float64) for site in found.sites}
    held = OrderedSums(sums)
    with torch.no_grad(), capture(block, found.sites) as taking, taking(lambda site, x: held.add(0, site, x)):
        block(x_TI)
    for expert, site in sites.items():
        moments = sums[site.name].moments()
        (matrix,) = site.matrices
        if expert not in block.seen:
            assert moments.tokens == 0  # starved, but found
            continue
        input_TI, output_TO = block.seen[expert]
        torch.testing.assert_close(moments.gram_II, input_TI.T @ input_TI)
        weight_OI = matrix.weight_OI(dict(block.named_parameters()))
        torch.testing.assert_close(input_TI @ weight_OI.T, output_TO)


@pytest.mark.parametrize("use", STACKS)
def test_what_chooses_for_a_bare_stack_is_a_router(use: str) -> None:
    _, _, found = looked_at(use, INPUTS, OUTPUTS)
    assert [(left.name, left.reason) for left in found.left_dense] == [("router", ROUTER)]


@pytest.mark.parametrize("odd", ["twice", "piece", "copy"])
def test_what_is_multiplied_in_another_way_is_named(odd: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(OUTPUTS, OUTPUTS))

        def forward(self, x_TI: Tensor) -> Tensor:
            if odd == "twice":
                return x_TI @ self.weight + x_TI @ self.weight.T
            if odd == "piece":
                return x_TI[:, : OUTPUTS // 2] @ self.weight[: OUTPUTS // 2, : OUTPUTS // 2]
            return x_TI @ self.weight.clone()

    block = Odd()
    with torch.no_grad():
        found = find_matrices(block, lambda: block(torch.randn(TOKENS, OUTPUTS)))
    assert not found.sites
    with pytest.raises(UnsupportedModel, match=r"^blocks.0.:.*leave_dense: ") as raised:
        found.check("blocks.0")
    assert raised.value.where in ("blocks.0", "blocks.0.")
