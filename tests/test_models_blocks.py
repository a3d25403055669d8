"""Running blocks one by one is only right for models that do nothing else between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from crosscal.errors import UnsupportedModel
from crosscal.models.blocks import BlockCalls, find_blocks, further_outputs, stubbed
from tests.helpers.tiny_models import configs, windows


class Layer(nn.Module):
    kind = "full"

    def __init__(self, several: object) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.several = several

    def forward(self, hidden_states: Tensor, extra: object = None) -> object:
        output = self.proj(hidden_states)
        if not self.several:
            return output
        return output, output.sum() if self.several is True else self.several


class Odd(PreTrainedModel):
    """A decoder with a habit."""

    config_class = LlamaConfig

    def __init__(self, habit: str) -> None:
        super().__init__(configs()["llama"])
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(Layer(habit == "several outputs") for _ in range(3))
        self.habit = habit

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x_BLD = self.embed(input_ids)
        reused: object = None
        for layer in self.layers if self.habit != "reversed" else reversed(self.layers):
            assert layer.kind == "full"
            passed = {"leaks": x_BLD.mean(1), "reads tokens": input_ids, "shares": {}, "reuses outputs": reused}
            extra = passed.get(self.habit)
            if self.habit == "skips" and layer is not self.layers[0]:
                continue
            output = layer(x_BLD, extra=extra)
            x_BLD, reused = output if isinstance(output, tuple) else (output, None)
            x_BLD = x_BLD * 2 if self.habit == "scales" else x_BLD
        return x_BLD


def run_twice(habit: str) -> BlockCalls:
    model = Odd(habit).eval()
    calls = BlockCalls(model, None)
    for seed in (0, 1):
        calls.enter(windows(2, seed=seed))
    return calls


def test_a_plain_chain_is_understood() -> None:
    calls, model = run_twice("none"), Odd("none")
    hidden_BLD = torch.randn(2, 24, 32)
    output_BLD = calls.of(torch.Size((2, 24)), 1).run(model.layers[1], hidden_BLD)
    torch.testing.assert_close(output_BLD, model.layers[1].proj(hidden_BLD))


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("scales", "between its blocks"),
        ("leaks", "depends on the output of another block"),
        ("shares", "may change between blocks"),
        ("reads tokens", "depend on the tokens"),
        ("reversed", "do not run once each, in order"),
        ("skips", "did not run all its blocks"),
    ],
)
def test_habits_that_a_walk_would_lose_are_refused(habit: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        run_twice(habit)


@torch.no_grad()
def test_further_outputs_of_a_block_must_stay_unused() -> None:
    model = Odd("several outputs")
    further = further_outputs(model, model.layers[0], windows(1))
    assert further is not None
    assert further[0] is not None
    assert further[0].isnan()
    BlockCalls(model, further).enter(windows(2))
    model.habit = "reuses outputs"
    with pytest.raises(UnsupportedModel, match="depends on the output of another block"):
        BlockCalls(model, further).enter(windows(2))


@torch.no_grad()
def test_an_output_that_cannot_be_watched_is_refused() -> None:
    model = Odd("several outputs")
    model.layers[0].several = {"shared": 1}
    with pytest.raises(UnsupportedModel, match=r"more than its hidden states \(got dict\)"):
        further_outputs(model, model.layers[0], windows(1))


def test_blocks_are_back_after_an_error() -> None:
    model = LlamaForCausalLM(configs()["llama"])
    name, blocks = find_blocks(model)
    before = list(blocks)
    with pytest.raises(ZeroDivisionError), stubbed(blocks, lambda *_: 1 / 0):
        model(windows(1))
    assert name == "model.layers"
    assert list(blocks) == before


def test_two_possible_lists_of_blocks_are_an_error() -> None:
    model = Odd("none")
    model.others = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(UnsupportedModel, match="layers, others"):
        find_blocks(model)
