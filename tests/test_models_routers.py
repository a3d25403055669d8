"""A router is a matrix that only chooses for others, whatever its size and name; every matrix of a block is listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from crosscal.models import Matrices, find_matrices
from crosscal.models.blocks import find_blocks
from crosscal.models.experts import is_experts
from crosscal.models.finding import GATE, ROUTER, SMALL
from tests.helpers.tiny_models import COMMON, windows

SIZES = [(32, 32, 32), (32, 32, 24), (24, 32, 32), (32, 24, 32)]
"""(experts, inner size of an expert, inner size of the shared expert); the hidden size is 32."""


def mixtures(experts: int, inner: int, shared: int) -> dict[str, PretrainedConfig]:
    t, common = transformers, {**COMMON, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    inner_only = {**common, "intermediate_size": inner}
    return {
        "mixtral": t.MixtralConfig(**inner_only, num_local_experts=experts),
        "gpt-oss": t.GptOssConfig(**inner_only, num_local_experts=experts, head_dim=8),
        "qwen2-moe": t.Qwen2MoeConfig(
            **common, num_experts=experts, moe_intermediate_size=inner, shared_expert_intermediate_size=shared
        ),
        "qwen3-moe": t.Qwen3MoeConfig(**common, num_experts=experts, moe_intermediate_size=inner, head_dim=8),
        "qwen3-next": t.Qwen3NextConfig(
            **common, num_experts=experts, moe_intermediate_size=inner, shared_expert_intermediate_size=shared,
            head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
        "deepseek-v3": t.DeepseekV3Config(
            **{**common, "num_key_value_heads": 4, "intermediate_size": shared}, n_routed_experts=experts,
            moe_intermediate_size=inner, n_shared_experts=1, n_group=4, topk_group=2, kv_lora_rank=32, q_lora_rank=32,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=0,
        ),
    }  # fmt: skip


@torch.no_grad()
def routers_by_trial(block: nn.Module, run: Callable[[], object]) -> set[str]:
    """Return the matrices whose change affects which experts run or their weights, but not the experts' inputs."""
    seen: list[list[Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append([value.clone() for value in (*args, *kwargs.values())])

    (experts,) = (module for module in block.modules() if is_experts(module))
    handle, found = experts.register_forward_pre_hook(note, with_kwargs=True), set()
    run()
    for name, parameter in block.named_parameters():
        if parameter.ndim < 2 or any(parameter is each for each in experts.parameters()):
            continue
        kept = parameter.clone()
        parameter.mul_(torch.randn_like(parameter) * 3)
        run()
        parameter.copy_(kept)
        reads, *choice = (torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))
        if reads and not all(choice):
            found.add(name)
    handle.remove()
    return found


def is_accounted_for_once(block: nn.Module, found: Matrices) -> bool:
    experts = {id(p) for module in block.modules() if is_experts(module) for p in module.parameters()}
    solved = [matrix.parameter for site in found.sites for matrix in site.matrices]
    listed = {*solved, *(left.parameter for left in found.left_dense)}
    due = {name for name, p in block.named_parameters() if p.ndim > 1 and (id(p) not in experts or name in solved)}
    return listed == due and not set(solved) & {left.parameter for left in found.left_dense}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("family", mixtures(32, 32, 32))
def test_routers_are_those_that_only_choose(family: str, sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(mixtures(*sizes)[family], experts_implementation="eager").eval()
    tokens_SL = windows(1)
    for block in find_blocks(model)[1]:
        with torch.no_grad():
            found = find_matrices(block, lambda: model(tokens_SL))
        routers = {left.parameter for left in found.left_dense if left.reason == ROUTER}
        assert routers == routers_by_trial(block, lambda: model(tokens_SL))
        assert len(routers) == 1
        assert is_accounted_for_once(block, found)
        others = {left.name: left.reason for left in found.left_dense if left.reason != ROUTER}
        assert others.items() <= {"mlp.shared_expert_gate": GATE, "linear_attn.conv1d": SMALL}.items()


class OneByOne(nn.Module):
    """A mixture of experts as older code has it: a list of plain linears."""

    def __init__(self, style: str, width: int = 20) -> None:
        super().__init__()
        self.style = style
        self.before = nn.Linear(width, width)
        self.scores = nn.Linear(width, width)  # as many experts as inputs: size does not identify it
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(width))
        self.for_all = nn.Linear(width, width)

    def forward(self, x_TI: Tensor) -> Tensor:
        x_TI = x_TI + self.before(x_TI)
        weight_TK, chosen_TK = self.scores(x_TI).softmax(-1).topk(2)
        y_TI = self.for_all(x_TI)
        for number, expert in enumerate(self.experts):
            is_chosen_TK = chosen_TK == number
            if self.style == "index":
                token_P, place_P = torch.where(is_chosen_TK)
                y_TI = y_TI.index_add(0, token_P, expert(x_TI[token_P]) * weight_TK[token_P, place_P, None])
            elif self.style == "mask":
                is_chosen_T = is_chosen_TK.any(-1)
                y_TI[is_chosen_T] += expert(x_TI[is_chosen_T])
            else:
                y_TI = y_TI + expert(torch.where(is_chosen_TK.any(-1, keepdim=True), x_TI, 0.0))
        return y_TI


@pytest.mark.parametrize("style", ["index", "mask", "where"])
def test_routers_of_experts_that_are_plain_linears(style: str) -> None:
    torch.manual_seed(0)
    block = OneByOne(style)
    with torch.no_grad():
        found = find_matrices(block, lambda: block(torch.randn(200, 20)))
    assert [(left.name, left.reason) for left in found.left_dense] == [("scores", ROUTER)]
    assert is_accounted_for_once(block, found)
    sites = [[matrix.name for matrix in site.matrices] for site in found.sites]
    experts = [[f"experts.{number}"] for number in range(20)]
    assert sites == [["before"], ["for_all"], *experts]


@pytest.mark.parametrize("outputs", [1, 2, 33])
def test_a_linear_of_one_output_is_a_gate(outputs: int) -> None:
    block = nn.Sequential(nn.Linear(33, 33), nn.Linear(33, outputs))
    found = find_matrices(block, lambda: block(torch.ones(4, 33)))
    assert [left.name for left in found.left_dense] == (["1"] if outputs == 1 else [])
    assert is_accounted_for_once(block, found)
