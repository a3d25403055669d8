"""Which matrices share an input, and which blocks are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from crosscal.errors import UnsupportedModel
from crosscal.models import MatrixRef, ModelSource, Site, find_sites, replaced_parameters, walk
from crosscal.models.blocks import find_blocks
from tests.helpers.tiny_models import configs, save_model, windows


def sites_of(family: str, tmp_path: Path) -> dict[int, tuple[Site, ...]]:
    found: dict[int, tuple[Site, ...]] = {}
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    walk(source, {"all": windows(1)}, on_block=lambda block: found.update({block.block: block.sites}))
    return found


def names(sites: tuple[Site, ...]) -> list[tuple[str, ...]]:
    return [tuple(matrix.name for matrix in site.matrices) for site in sites]


def test_a_llama_block_has_four_sites_and_seven_matrices(tmp_path: Path) -> None:
    for sites in sites_of("llama", tmp_path).values():
        assert names(sites) == [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ]
        assert [site.name for site in sites] == [matrices[0] for matrices in names(sites)]
        assert [site.inputs for site in sites] == [32, 32, 32, 48]


def test_a_parallel_block_shares_one_input(tmp_path: Path) -> None:
    assert names(sites_of("falcon-parallel", tmp_path)[0])[0] == ("self_attention.query_key_value", "mlp.dense_h_to_4h")


def test_conv1d_is_turned_around(tmp_path: Path) -> None:
    sites = {site.name: site for site in sites_of("gpt2", tmp_path)[0]}
    up = sites["mlp.c_fc"].matrices[0]
    assert up.transposed
    assert sites["mlp.c_fc"].inputs == 32
    layer = Conv1D(48, 32)
    input_TI = torch.randn(5, 32)
    weight_OI = up.weight_OI({"mlp.c_fc.weight": layer.weight})
    torch.testing.assert_close(input_TI @ weight_OI.T + layer.bias, layer(input_TI))


def test_each_expert_has_two_sites_and_the_router_none(tmp_path: Path) -> None:
    sites = sites_of("mixtral", tmp_path)[1]
    expected = [(f"mlp.experts.{e}.{part}",) for e in range(4) for part in ("gate_up_proj", "down_proj")]
    assert [matrices for matrices in names(sites) if "mlp" in matrices[0]] == expected


def test_replacing_experts_leaves_the_others_alone() -> None:
    stack = torch.randn(3, 4, 5)
    second, transposed = (MatrixRef(f"x.{e}", "x", e, turned) for e, turned in ((1, False), (2, True)))
    changed = replaced_parameters({"x": stack}, {second: torch.ones(4, 5), transposed: torch.zeros(5, 4)})["x"]
    assert torch.equal(changed[0], stack[0])
    assert torch.equal(changed[1:], torch.stack([torch.ones(4, 5), torch.zeros(4, 5)]))


class Block(nn.Module):
    """A block that a site finder must either understand in full or refuse."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        if odd == "matrix":
            self.mixing = nn.Parameter(torch.zeros(32, 32))
        if odd == "embedding":
            self.table = nn.Embedding(32, 32)

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TI = self.first(x_TI)
        if self.odd == "unused":
            return y_TI
        if self.odd == "twice":
            y_TI = self.first(y_TI)
        if self.odd == "in place":
            x_TI += 1
        return self.second(x_TI) + y_TI


@pytest.mark.parametrize(
    ("odd", "named"),
    [("matrix", "mixing"), ("embedding", "table"), ("unused", "second"), ("twice", "first")],
)
def test_what_is_not_understood_is_named(odd: str, named: str) -> None:
    block = Block(odd)
    with pytest.raises(UnsupportedModel, match=f"^{named}:"), torch.no_grad():
        find_sites(block, lambda: block(torch.ones(4, 32)))


@pytest.mark.parametrize(("odd", "sites"), [("nothing", 1), ("in place", 2)])
def test_an_input_changed_in_place_is_another_input(odd: str, sites: int) -> None:
    block = Block(odd)
    with torch.no_grad():
        assert len(find_sites(block, lambda: block(torch.ones(4, 32)))) == sites


def test_hooks_are_gone_afterwards() -> None:
    block = Block("twice")
    with pytest.raises(UnsupportedModel):
        find_sites(block, lambda: block(torch.ones(4, 32)))
    assert not any(module._forward_pre_hooks for module in block.modules())


@torch.no_grad()
def test_a_linear_that_multiplies_in_groups_is_as_many_matrices() -> None:
    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            weight_GOI = self.weight.unflatten(0, (2, -1))
            return torch.einsum("tgi,goi->tgo", input.unflatten(-1, (2, -1)), weight_GOI).flatten(1)

    class Plain(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T + self.bias

    block = nn.Sequential(Plain(64, 96), nn.Tanh(), Grouped(48, 40, bias=False))
    sites = find_sites(block, lambda: block(torch.randn(9, 64)))
    found = {matrix.name: site.inputs for site in sites for matrix in site.matrices}
    assert found == {"0": 64, "2.0.weight": 48, "2.1.weight": 48}


@torch.no_grad()
def test_an_unmarked_stack_of_experts_is_known_by_its_products() -> None:
    """The matrices are found with the same orientation; a stack that never runs is named in the error."""
    model = MixtralForCausalLM._from_config(configs()["mixtral"], experts_implementation="eager").eval()
    block, tokens_SL = find_blocks(model)[1][0], windows(4)
    marked = {matrix for site in find_sites(block, lambda: model(tokens_SL)) for matrix in site.matrices}
    del block.mlp.experts.has_bias
    unmarked = {matrix for site in find_sites(block, lambda: model(tokens_SL)) for matrix in site.matrices}
    assert {dataclasses.replace(matrix, is_called=True) for matrix in unmarked} == marked
    assert unmarked != marked
    with pytest.raises(UnsupportedModel, match=r"mlp\.experts\.gate_up_proj"):
        find_sites(block, lambda: None)
