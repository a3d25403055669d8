"""The walker against a plain forward pass of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosscal.errors import ModelError
from crosscal.models import BlockMoments, ModelSource, replaced_parameters, walk
from crosscal.models.blocks import StopForward
from crosscal.models.capture import capture
from crosscal.models.finding import find_sites
from crosscal.models.passes import OrderedSums
from crosscal.statistics.moments import InputMoments, MomentsAccumulator
from tests.helpers.tiny_models import FAMILIES, VOCABULARY, load_plain, plain_grams, save_model, windows

ROUNDOFF_F64 = 1e-11
ROUNDOFF_F32 = 2e-5


def collect(source: ModelSource, slices: Mapping[str, Tensor], **settings) -> dict[str, dict[str, InputMoments]]:
    """Slice -> full name of a matrix -> the moments of its site."""
    seen: dict[str, dict[str, InputMoments]] = {name: {} for name in slices}

    def on_block(found: BlockMoments) -> None:
        for name, sites in found.moments.items():
            seen[name] |= {f"{found.name}.{m.name}": sites[site.name] for site in found.sites for m in site.matrices}

    walk(source, slices, on_block=on_block, **settings)
    return seen


def assert_same(seen: Mapping[str, InputMoments], expected: Mapping[str, InputMoments], rtol: float) -> None:
    assert seen.keys() == expected.keys()
    for name, moments in seen.items():
        assert moments.tokens == expected[name].tokens, name
        scale = float(expected[name].gram_II.abs().max())
        torch.testing.assert_close(moments.gram_II, expected[name].gram_II, rtol=0, atol=rtol * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_sees_what_a_plain_forward_shows(family: str, tmp_path: Path) -> None:
    folder, tokens_SL = save_model(family, tmp_path / "model"), windows(5)
    source = ModelSource.open(folder)
    seen = collect(source, {"all": tokens_SL}, dtype=torch.float64, batch_tokens=48)["all"]
    grams, tokens = plain_grams(load_plain(folder), tokens_SL)
    routers = {name for name in grams if name.endswith("shared_expert_gate")}
    inside = {name for name in grams if name.startswith(source.block_name(0)[:-1])} - routers
    assert inside <= seen.keys(), "a matrix of a block is left out"
    assert all(seen[name].tokens == 0 for name in seen.keys() - inside), "only starved experts may be missing there"
    for name in inside:
        assert seen[name].tokens == tokens[name]
        scale = float(grams[name].abs().max())
        torch.testing.assert_close(seen[name].gram_II, grams[name], rtol=0, atol=ROUNDOFF_F64 * scale, msg=name)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_float32_is_close_to_float64(family: str, tmp_path: Path) -> None:
    source, slices = ModelSource.open(save_model(family, tmp_path / "model")), {"all": windows(4)}
    wide, narrow = (collect(source, slices, dtype=dtype)["all"] for dtype in (torch.float64, None))
    assert next(iter(narrow.values())).gram_II.dtype == torch.float32
    for name, moments in narrow.items():
        assert moments.tokens == wide[name].tokens
        expected = wide[name].gram_II
        assert float((moments.gram_II - expected).norm()) <= ROUNDOFF_F32 * float(expected.norm()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_gpu_gives_the_same(family: str, tmp_path: Path) -> None:
    source, slices = ModelSource.open(save_model(family, tmp_path / "model")), {"all": windows(4)}
    there, here = (collect(source, slices, dtype=torch.float64, device=device)["all"] for device in ("cuda", "cpu"))
    assert_same(there, here, ROUNDOFF_F64)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Its blocks have different masks, which must not be mixed up for batches of different shapes."""
    return ModelSource.open(save_model("gemma3", tmp_path_factory.mktemp("gemma3")))


def test_batches_do_not_matter(gemma: ModelSource) -> None:
    slices = {"all": windows(5)}
    one, two, all_at_once = (
        collect(gemma, slices, dtype=torch.float64, batch_tokens=t)["all"] for t in (1, 48, 10_000)
    )
    assert_same(one, two, ROUNDOFF_F64)
    assert_same(one, all_at_once, ROUNDOFF_F64)


def test_moments_of_slices_add_up(gemma: ModelSource) -> None:
    tokens_SL = windows(5)
    slices = {"first": tokens_SL[:2], "rest": tokens_SL[2:], "all": tokens_SL}
    seen = collect(gemma, slices, dtype=torch.float64, batch_tokens=48)
    assert_same({name: seen["first"][name] + seen["rest"][name] for name in seen["all"]}, seen["all"], ROUNDOFF_F64)


def test_slices_may_have_windows_of_different_length(gemma: ModelSource) -> None:
    short, long = windows(3, length=12), windows(2, length=24)
    together = collect(gemma, {"short": short, "long": long}, dtype=torch.float64)
    assert_same(together["short"], collect(gemma, {"short": short}, dtype=torch.float64)["short"], ROUNDOFF_F64)
    assert_same(together["long"], collect(gemma, {"long": long}, dtype=torch.float64)["long"], ROUNDOFF_F64)


def test_hidden_states_may_live_on_disk(gemma: ModelSource, tmp_path: Path) -> None:
    slices = {"a": windows(3), "b": windows(2, seed=1)}
    spilled = collect(gemma, slices, spill_to=tmp_path / "spill", batch_tokens=48)
    held = collect(gemma, slices, batch_tokens=48)
    for name in slices:
        assert_same(spilled[name], held[name], 0.0)
    assert list((tmp_path / "spill").iterdir()) == []


def halve_small(found: BlockMoments) -> dict[str, Tensor]:
    """Act as a solver: zero the weights of every matrix up to its median magnitude."""
    weights_OI = {m: m.weight_OI(found.parameters) for site in found.sites for m in site.matrices}
    return replaced_parameters(found.parameters, {m: w * (w.abs() > w.abs().median()) for m, w in weights_OI.items()})


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-new", "mixtral"])
def test_sequential_is_the_plain_loop(family: str, tmp_path: Path) -> None:
    """Block after block: measure on the model as changed so far, change the block, continue with the next."""
    folder, tokens_SL = save_model(family, tmp_path / "model"), windows(4)
    seen: dict[str, InputMoments] = {}
    changes: list[tuple[str, dict[str, Tensor]]] = []

    def on_block(found: BlockMoments) -> dict[str, Tensor]:
        for site in found.sites:
            seen.update({f"{found.name}.{m.name}": found.moments["all"][site.name] for m in site.matrices})
        changes.append((found.name, halve_small(found)))
        return changes[-1][1]

    source = ModelSource.open(folder)
    walk(source, {"all": tokens_SL}, on_block=on_block, upstream="sequential", dtype=torch.float64, batch_tokens=48)
    model = load_plain(folder)
    checked = 0
    for block, changed in changes:
        grams, _ = plain_grams(model, tokens_SL)
        for name in (name for name in grams if name.startswith(f"{block}.")):
            scale = float(grams[name].abs().max())
            torch.testing.assert_close(seen[name].gram_II, grams[name], rtol=0, atol=ROUNDOFF_F64 * scale, msg=name)
            checked += 1
        model.load_state_dict({f"{block}.{name}": value for name, value in changed.items()}, strict=False)
    assert checked >= 3 * source.blocks


def test_a_walk_resumes_where_it_stopped(gemma: ModelSource) -> None:
    slices = {"all": windows(3)}
    whole = collect(gemma, slices)["all"]
    resumed = collect(gemma, slices, wanted=lambda block: block == 1)["all"]
    assert_same(resumed, {n: m for n, m in whole.items() if n.startswith(gemma.block_name(1))}, 0.0)


def test_a_sequential_walk_resumes_with_the_weights_chosen_before(gemma: ModelSource) -> None:
    chosen: dict[int, dict[str, Tensor]] = {}
    last: list[InputMoments] = []

    def solve(found: BlockMoments) -> dict[str, Tensor]:
        if found.block == 2:
            last.append(found.moments["all"]["mlp.down_proj"])
        if found.block not in chosen:
            chosen[found.block] = halve_small(found)
        else:
            assert found.moments == {}
        return chosen[found.block]

    slices = {"all": windows(3)}
    walk(gemma, slices, on_block=solve, upstream="sequential")
    del chosen[2]
    walk(gemma, slices, on_block=solve, upstream="sequential", wanted=lambda block: block == 2)
    assert torch.equal(last[0].gram_II, last[1].gram_II)


def test_nothing_runs_after_the_last_wanted_block(gemma: ModelSource) -> None:
    steps: list[str] = []
    report = walk(
        gemma, {"all": windows(2)}, on_block=lambda found: None, wanted=lambda block: block < 2,
        progress=lambda name, done, total: steps.append(f"{name} {done}/{total}"),
    )  # fmt: skip
    assert walk(gemma, {"all": windows(2)}, on_block=lambda found: None, wanted=lambda block: False).blocks == 0
    assert steps == ["model.layers.0 1/2", "model.layers.1 2/2"]
    assert (report.blocks, report.tokens) == (2, 48)


def test_a_starved_expert_has_no_tokens(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("mixtral", tmp_path / "model"))
    seen = collect(source, {"all": windows(1, length=1)})["all"]
    counts = [moments.tokens for name, moments in seen.items() if ".experts." in name]
    assert counts.count(0) == counts.count(1) == len(counts) / 2  # one token reaches two of four experts


@pytest.mark.parametrize(
    ("tokens_SL", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "at least one window"),
        (torch.zeros(1, 65, dtype=torch.long), "longer than the model's positions"),
        (torch.full((1, 8), VOCABULARY), "outside the model's vocabulary"),
    ],
)
def test_unusable_windows_are_named(gemma: ModelSource, tokens_SL: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        walk(gemma, {"odd": tokens_SL}, on_block=lambda found: None)


def test_an_overflow_names_its_block(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model", scale=1e15)
    with pytest.raises(ModelError, match="not finite after block 0"):
        walk(ModelSource.open(folder), {"all": windows(2)}, on_block=lambda found: None)


def test_an_overflow_is_found_where_no_outputs_are_wanted(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model", scale=1e15)
    with pytest.raises(ModelError, match=r"inputs of self_attn.o_proj in slice 'all' are not finite in block 0"):
        walk(ModelSource.open(folder), {"all": windows(2)}, on_block=lambda found: {}, upstream="sequential")


def test_a_pass_without_outputs_ends_at_the_last_site(tmp_path: Path) -> None:
    model, tokens_SL = load_plain(save_model("llama", tmp_path / "model")), windows(2)
    block, ran = model.model.layers[0], list[str]()
    sites = find_sites(block, lambda: model(tokens_SL))
    for site in sites:
        for matrix in site.matrices:
            block.get_submodule(matrix.name).register_forward_hook(lambda *_, name=matrix.name: ran.append(name))
    sums = {site.name: MomentsAccumulator(site.inputs, dtype=torch.float64) for site in sites}
    with capture(block, sites) as taking:
        for passes in (1, 2):
            with pytest.raises(StopForward), taking(partial(OrderedSums(sums).add, 0), stop_after_last=True):
                model(tokens_SL)
            assert {sum_.moments().tokens for sum_ in sums.values()} == {passes * tokens_SL.numel()}
    assert len(ran) == 2 * 6
    assert "mlp.down_proj" not in ran


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "phi", "falcon-new", "mixtral", "qwen2-moe"])
def test_a_last_block_shows_what_it_shows_with_blocks_behind_it(family: str, tmp_path: Path) -> None:
    """Its passes end at the last site, also if attention and MLP are parallel or experts are starved."""
    source, slices = ModelSource.open(save_model(family, tmp_path / "model")), {"all": windows(3, length=5)}
    whole = collect(source, slices, batch_tokens=5)["all"]
    ended = collect(source, slices, batch_tokens=5, wanted=lambda block: block == 0)["all"]
    assert_same(ended, {n: m for n, m in whole.items() if n.startswith(f"{source.block_name(0)}.")}, 0.0)
