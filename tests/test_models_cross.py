"""Two streams of hidden states side by side: inputs of compressed blocks paired with those of the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from crosscal.errors import StatisticsError, UnsupportedModel, UsageError
from crosscal.models import BlockMoments, ModelSource, walk
from crosscal.statistics import EVERY, InputMoments, MomentsAccumulator, Statistic
from crosscal.statistics.half_product import INPUTS_A_STRIP
from tests.helpers.problems import correlated_inputs_TI
from tests.helpers.tiny_models import load_plain, save_model, windows
from tests.test_models_walk import halve_small

ROUNDOFF_F64 = 1e-11
BOTH = frozenset(Statistic)
Seen = dict[str, dict[str, InputMoments]]
"""Slice -> full name of a matrix -> the moments of its site."""


def walked(source: ModelSource, slices: Mapping[str, Tensor], **settings: Any) -> tuple[Seen, dict[str, Any]]:
    """Return the moments and every block's changed parameters of a sequential walk."""
    seen: Seen = {name: {} for name in slices}
    changes: dict[str, Any] = {}

    def on_block(found: BlockMoments) -> dict[str, Tensor]:
        for name, sites in found.moments.items():
            seen[name] |= {f"{found.name}.{m.name}": sites[site.name] for site in found.sites for m in site.matrices}
        changes[found.name] = halve_small(found) if found.sites else CHOSEN[found.name]
        return changes[found.name]

    settings = {"dtype": torch.float64, "batch_tokens": 48, "statistics": BOTH} | settings
    walk(source, slices, on_block=on_block, upstream="sequential", **settings)
    return seen, changes


CHOSEN: dict[str, dict[str, Tensor]] = {}
"""Block -> parameters that an earlier walk chose, for blocks that are not wanted."""


@torch.no_grad()
def plain_inputs(model: PreTrainedModel, tokens_SL: Tensor) -> dict[str, Tensor]:
    """Return the input of every linear in one plain forward pass, [tokens, inputs]."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, input_SLI: Tensor) -> None:
        inputs[name] = input_SLI.reshape(-1, input_SLI.shape[-1]).clone()

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in linears.items()
    ]
    model(input_ids=tokens_SL, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


def assert_close(mine_II: Tensor, theirs_II: Tensor, scale: float) -> None:
    torch.testing.assert_close(mine_II, theirs_II, rtol=0, atol=ROUNDOFF_F64 * scale)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon-new"])
def test_pairs_are_those_of_two_plain_forward_passes(family: str, tmp_path: Path) -> None:
    folder, tokens_SL = save_model(family, tmp_path / "model"), windows(4)
    seen, changes = walked(ModelSource.open(folder), {"all": tokens_SL})
    dense, model = plain_inputs(load_plain(folder), tokens_SL), load_plain(folder)
    drifted = 0
    for block, changed in changes.items():
        compressed = plain_inputs(model, tokens_SL)
        for name in (name for name in compressed if name.startswith(f"{block}.")):
            x_TI, y_TI, found = dense[name], compressed[name], seen["all"][name]
            scale = float(y_TI.square().sum(0).max() + x_TI.square().sum(0).max())
            assert_close(found[Statistic.CROSS], x_TI.mT @ y_TI, scale)
            assert_close(found[Statistic.DRIFT], (x_TI - y_TI).mT @ (x_TI - y_TI), scale)
            assert_close(found.gram_II, y_TI.mT @ y_TI, scale)
            drifted += not torch.equal(found[Statistic.CROSS], found[Statistic.CROSS].mT)
        model.load_state_dict({f"{block}.{name}": value for name, value in changed.items()}, strict=False)
    assert drifted >= 2 * 3, "behind the first block the streams differ, and their product is not symmetric"


def test_where_nothing_is_compressed_yet_both_streams_are_one(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    seen, _ = walked(source, {"all": windows(4)}, dtype=torch.float32)
    first = {name: found for name, found in seen["all"].items() if name.startswith(source.block_name(0))}
    for found in first.values():
        assert not found[Statistic.DRIFT].any()
        torch.testing.assert_close(found[Statistic.CROSS], found.gram_II, rtol=1e-4, atol=1e-4)
    assert all(found[Statistic.DRIFT].any() for name, found in seen["all"].items() if name not in first)


def test_the_other_sums_do_not_depend_on_the_pairs(tmp_path: Path) -> None:
    """Bit for bit: a recipe without pairs is not changed by one that needs them."""
    source, slices = ModelSource.open(save_model("llama", tmp_path / "model")), {"all": windows(4)}
    beside, alone = (walked(source, slices, statistics=wanted)[0]["all"] for wanted in (BOTH, EVERY))
    for name, found in alone.items():
        assert found.sums.keys() == EVERY
        assert all(torch.equal(beside[name][which], found[which]) for which in EVERY)


def test_pairs_of_slices_add_up(tmp_path: Path) -> None:
    tokens_SL = windows(5)
    slices = {"first": tokens_SL[:2], "rest": tokens_SL[2:], "all": tokens_SL}
    seen, _ = walked(ModelSource.open(save_model("llama", tmp_path / "model")), slices)
    for name, whole in seen["all"].items():
        added = seen["first"][name] + seen["rest"][name]
        for which in (Statistic.CROSS, Statistic.DRIFT):
            assert_close(added[which], whole[which], float(whole[which].abs().max() + whole.gram_II.abs().max()))


def bits(seen: Seen) -> dict[tuple[str, str, str], bytes]:
    return {
        (name, matrix, which): found[which].numpy().tobytes()
        for name, of_slice in seen.items()
        for matrix, found in of_slice.items()
        for which in Statistic
    }


def test_pairs_have_the_same_bits_on_any_number_of_threads_and_on_disk(tmp_path: Path) -> None:
    """The model is wide enough for sums in strips."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=2 * INPUTS_A_STRIP,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    source, spill = ModelSource.open(tmp_path / "model"), tmp_path / "spill"
    slices = {"one": windows(9, length=6) % 90, "two": windows(2, length=12) % 90}
    before, found = torch.get_num_threads(), []
    try:
        for threads, spill_to in ((1, None), (2, spill), (8, None)):
            torch.set_num_threads(threads)
            found.append(bits(walked(source, slices, dtype=torch.float32, batch_tokens=12, spill_to=spill_to)[0]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert list(spill.iterdir()) == []


def test_a_walk_that_goes_on_pairs_the_same_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, slices = ModelSource.open(save_model("gemma3", tmp_path / "model")), {"all": windows(3)}
    whole, changes = walked(source, slices)
    for name, changed in changes.items():
        monkeypatch.setitem(CHOSEN, name, changed)
    resumed, _ = walked(source, slices, wanted=lambda block: block == 2)
    last = {name for name in whole["all"] if name.startswith(source.block_name(2))}
    assert resumed["all"].keys() == last
    assert all(torch.equal(resumed["all"][n][w], whole["all"][n][w]) for n in last for w in Statistic)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_routed_tokens_have_no_pairs(family: str, tmp_path: Path) -> None:
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    with pytest.raises(UnsupportedModel, match="tokens are routed") as caught:
        walked(source, {"all": windows(2)})
    assert ".experts." in str(caught.value.where)


def test_a_dense_walk_has_one_stream(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    with pytest.raises(UsageError, match="upstream: sequential"):
        walk(source, {"all": windows(2)}, on_block=lambda found: None, statistics=BOTH)


def test_inputs_of_other_tokens_are_refused() -> None:
    both, one = MomentsAccumulator(8, wanted=tuple(Statistic)), MomentsAccumulator(8)
    x_TI = correlated_inputs_TI(6, 8, seed=0).float()
    for accumulator, pair in ((both, (x_TI,)), (both, (x_TI, x_TI[:5])), (one, (x_TI, x_TI))):
        with pytest.raises(StatisticsError, match="same tokens"):
            accumulator.add(*pair)


@pytest.mark.parametrize("inputs", [1, 17, 2 * INPUTS_A_STRIP])
@pytest.mark.parametrize("wanted", [tuple(Statistic), (Statistic.CROSS,)], ids=["all", "cross"])
def test_sums_over_pairs_are_those_over_tokens(inputs: int, wanted: tuple[Statistic, ...]) -> None:
    """Also for strided inputs; if only CROSS is wanted, DRIFT is summed as well."""
    accumulator = MomentsAccumulator(inputs, dtype=torch.float64, wanted=wanted)
    x_TI, y_TI = (correlated_inputs_TI(2 * 530, inputs, seed=seed)[::2] for seed in (1, 2))
    accumulator.add(y_TI[:7], x_TI[:7])
    accumulator.add(y_TI[7:].view(-1, 1, inputs), x_TI[7:].view(-1, 1, inputs))
    found = accumulator.finish()
    assert found.tokens == 530
    scale = float(x_TI.square().sum(0).max() + y_TI.square().sum(0).max())
    assert_close(found[Statistic.CROSS], torch.einsum("ti,tj->ij", x_TI, y_TI), scale)
    assert_close(found[Statistic.DRIFT], torch.einsum("ti,tj->ij", x_TI - y_TI, x_TI - y_TI), scale)
