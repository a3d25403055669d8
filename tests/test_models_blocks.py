"""Running blocks one by one is only correct for models that compute nothing between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from crosscal.errors import UnsupportedModel
from crosscal.models.blocks import BlockCalls, find_blocks, further_outputs, stubbed
from crosscal.models.calls import CarriedState
from tests.helpers.tiny_models import configs, windows


class Layer(nn.Module):
    kind = "full"

    def __init__(self, several: object) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.several = several

    def forward(self, hidden_states: Tensor, extra: object = None) -> object:
        output = self.proj(hidden_states)
        if isinstance(extra, dict):
            output = output + extra.get("left", 0)
            extra["left"] = output.mean(-1, keepdim=True)
        elif isinstance(extra, Tensor):
            output = output + extra.reshape(*extra.shape, *[1] * (output.ndim - extra.ndim))
        if not self.several:
            return output
        return output, output.sum(-1) if self.several is True else self.several


class Odd(PreTrainedModel):
    """A decoder that does one unusual thing, its habit."""

    config_class = LlamaConfig

    def __init__(self, habit: str) -> None:
        super().__init__(configs()["llama"])
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(Layer("outputs" in habit) for _ in range(3))
        self.habit = habit

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x_BLD = self.embed(input_ids)
        reused: Any = None
        shared: dict[str, Tensor] = {}
        for layer in self.layers if self.habit != "reversed" else reversed(self.layers):
            assert layer.kind == "full"
            passed = {
                "leaks": x_BLD.mean((1, 2)),
                "reads tokens": input_ids,
                "shares": shared,
                "reuses outputs": reused,
            }
            passed["changes outputs"] = None if reused is None else reused * 2
            extra = passed.get(self.habit)
            if self.habit == "skips" and layer is not self.layers[0]:
                continue
            output = layer(x_BLD, extra=extra)
            x_BLD, reused = output if isinstance(output, tuple) else (output, None)
            x_BLD = x_BLD * 2 if self.habit == "scales" else x_BLD
        return x_BLD


@torch.no_grad()
def calls_of(habit: str) -> tuple[Odd, BlockCalls, dict[int, Tensor]]:
    """Return a model with this habit, its block calls, and the inputs of its first block, for three batches."""
    torch.manual_seed(0)
    model = Odd(habit).eval()
    calls = BlockCalls(model, further_outputs(model, model.layers[0], windows(1)))
    return (
        model,
        calls,
        {seed: calls.enter(windows(count, seed=seed), seed) for seed, count in ((0, 2), (1, 2), (2, 1))},
    )


@pytest.mark.parametrize("habit", ["none", "several outputs", "reads tokens", "shares", "reuses outputs"])
@torch.no_grad()
def test_blocks_one_by_one_give_what_the_model_gives(habit: str) -> None:
    """All batches pass a block before the next one, each twice as in a walk: once for the sums, once for the output."""
    model, calls, hidden = calls_of(habit)
    between = dict.fromkeys(hidden, CarriedState())
    for block in range(3):
        for batch in hidden:
            again = calls.run(batch, block, hidden[batch], between[batch])[0]
            hidden[batch], between[batch] = calls.run(batch, block, hidden[batch], between[batch])
            assert torch.equal(hidden[batch], again)
    for batch, hidden_BLD in hidden.items():
        assert torch.equal(hidden_BLD, model(windows(len(hidden_BLD), seed=batch)))


@torch.no_grad()
def test_what_is_handed_on_can_be_had_of_the_first_window() -> None:
    for habit in ("shares", "reuses outputs"):
        _, calls, hidden = calls_of(habit)
        calls.enter(windows(2, seed=0)[:1], "first")
        output_BLD, between = calls.run(0, 0, hidden[0], CarriedState())
        first_1LD, _ = calls.run("first", 1, output_BLD[:1], between.first())
        torch.testing.assert_close(first_1LD, calls.run(0, 1, output_BLD, between)[0][:1])


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("scales", "between its blocks"),
        ("leaks", "depends on the output of another block"),
        ("changes outputs", "depends on the output of another block"),
        ("reversed", "do not run once each, in order"),
        ("skips", "did not run all its blocks"),
    ],
)
def test_habits_that_a_walk_would_lose_are_refused(habit: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        calls_of(habit)


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
