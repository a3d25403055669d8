"""Which norm can absorb a site's scales: found by observing the block, and verified by running it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, Olmo2Config, OPTConfig, PretrainedConfig

from crosscal.models import ModelSource, Site, find_sites, replaced_parameters, walk
from crosscal.models.producers import EXPERT, NO_NORM, with_producers
from crosscal.models.sites import InputNorm
from tests.helpers.tiny_models import COMMON, FAMILIES, VOCABULARY, load_plain, save_model, windows

FIRST_AND_UP = 2  # sites of a block that norms produce: the first of attention and of the feed-forward part
PRODUCERS = {  # of blocks 0 and 1
    **dict.fromkeys(FAMILIES, (FIRST_AND_UP, FIRST_AND_UP)),
    **dict.fromkeys(("phi", "falcon-parallel"), (1, 1)),  # parallel: attention and feed-forward part read one norm
    **dict.fromkeys(("mixtral", "qwen2-moe", "gpt-oss"), (1, 1)),  # a router reads the second norm
    "qwen3-moe": (1, 2),
    "deepseek-v3": (4, 3),  # two inner norms; the second block has a router
}


def found_in(model: Path) -> dict[int, tuple[Site, ...]]:
    found: dict[int, tuple[Site, ...]] = {}
    source = ModelSource.open(model)
    walk(source, {"all": windows(1)}, on_block=lambda block: found.update({block.block: block.sites}))
    return found


def save(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                0.3 * torch.randn(parameter.shape) if parameter.ndim > 1 else torch.rand(parameter.shape) + 0.5
            )
    model.save_pretrained(folder)
    return folder


def random_scale_I(inputs: int, seed: int) -> Tensor:
    return 3.0 ** (2 * torch.rand(inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fold_changes_no_logit(family: str, tmp_path: Path) -> None:
    """Every block's norms are divided by random scales, in a plain float64 model; Gemma's norms compute in float32."""
    path = save_model(family, tmp_path / "model")
    found, source, model, tokens_SL = found_in(path), ModelSource.open(path), load_plain(path), windows(3, seed=5)
    before = model(tokens_SL, use_cache=False).logits
    state = model.state_dict()
    for block, sites in found.items():
        prefix = f"{source.block_name(block)}."
        parameters = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        changed: dict[str, Tensor] = {}
        for number, site in enumerate(site for site in sites if site.producer):
            assert site.producer
            assert not site.no_producer
            scale_I = random_scale_I(site.inputs, 10 * block + number)
            changed |= replaced_parameters(parameters, {m: m.weight_OI(parameters) * scale_I for m in site.matrices})
            changed |= site.producer.divided(parameters, scale_I)
        for name, value in changed.items():
            assert not torch.equal(state[prefix + name], value)
            state[prefix + name].copy_(value)
    after = model(tokens_SL, use_cache=False).logits
    assert tuple(sum(site.producer is not None for site in found[block]) for block in (0, 1)) == PRODUCERS[family]
    rounding = 1e-5 if family.startswith("gemma") else 1e-10
    assert (after - before).norm() <= rounding * before.norm()
    for site in (site for sites in found.values() for site in sites if site.producer is None):
        assert site.no_producer in (EXPERT, NO_NORM) or site.no_producer.startswith("something else depends on")


def test_norms_behind_a_residual_branch_are_refused(tmp_path: Path) -> None:
    """OPT-350m's and Bloom's variants add the norm's own output to what follows; OLMo 2 norms outputs, not inputs."""
    small = {"vocab_size": VOCABULARY, "hidden_size": 32}
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2}
    opt = OPTConfig(**small, **heads, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64,
                    do_layer_norm_before=False)  # fmt: skip
    bloom = BloomConfig(**small, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True)
    for name, config, reasons in (
        ("opt", opt, {"fc1": "something else depends on self_attn_layer_norm"}),
        ("bloom", bloom, {"self_attention.query_key_value": "something else depends on input_layernorm",
                          "mlp.dense_h_to_4h": "something else depends on post_attention_layernorm"}),
        ("olmo2", Olmo2Config(**COMMON), {"self_attn.q_proj": NO_NORM, "mlp.gate_proj": NO_NORM}),
    ):  # fmt: skip
        sites = {site.name: site for site in found_in(save(config, tmp_path / name))[1]}
        assert all(site.producer is None for site in sites.values())
        assert {site: sites[site].no_producer for site in reasons} == reasons


def test_a_norm_that_two_blocks_share_is_tied(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama", tmp_path / "model"))
    assert [source.tied_in_block(block) for block in range(3)] == [set(), set(), set()]
    layers = source.weights.model.model.layers
    layers[0].input_layernorm.weight = layers[2].input_layernorm.weight
    layers[1].input_layernorm.weight = layers[1].post_attention_layernorm.weight
    inner = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert [source.tied_in_block(block) for block in range(3)] == [
        {"input_layernorm.weight"},
        inner,
        {"input_layernorm.weight"},
    ]


class Norm(nn.Module):
    """x / rms(x), times a gain that is stored minus `offset`; `bent` adds a tanh."""

    def __init__(self, offset: float = 0.0, *, bent: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5 - offset)
        self.offset, self.bent = offset, bent

    def forward(self, x: Tensor) -> Tensor:
        y = x * x.square().mean(-1, keepdim=True).rsqrt() * (self.offset + self.weight)
        return y.tanh() if self.bent else y


class Block(nn.Module):
    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.norm = Norm(1.0 if odd == "gain less one" else 0.0, bent=odd == "bent")
        self.layer_norm = nn.LayerNorm(32)
        nn.init.normal_(self.layer_norm.bias)
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)
        self.third, self.gate = nn.Linear(32, 32), nn.Linear(32, 1)
        if odd == "tied":
            self.layer_norm.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        if self.odd == "in place":
            z += 1
        if self.odd == "view":
            z = z.view(-1, 32)
        y = self.second(self.first(z).relu())
        if self.odd == "residual":
            y = y + z
        if self.odd == "gate":
            y = y * self.gate(z).sigmoid()
        if self.odd == "twice":
            y = self.norm(y)
        if self.odd == "faint":
            y = y + 1e-4 * z
        return y + self.third(self.layer_norm(x))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("nothing", ""),
        ("gain less one", ""),
        ("view", ""),
        ("in place", NO_NORM),
        ("residual", "something else depends on norm"),
        ("faint", "something else depends on norm"),
        ("gate", "something else depends on norm"),
        ("twice", "something else depends on norm"),
        ("bent", "something else depends on norm"),
        ("tied", "norm.weight is tied to another parameter of the model"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_what_cannot_be_folded_is_named(odd: str, reason: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block, x_TI = Block(odd).to(dtype), torch.randn(40, 32, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    tied = ("norm.weight", "layer_norm.weight") if odd == "tied" else ()
    sites = with_producers(block, find_sites(block, lambda: block(x_TI)), lambda: block(x_TI), tied)
    first, second, third = (next(s for s in sites if s.name == name) for name in ("first", "second", "third"))
    assert first.no_producer == reason
    assert (first.producer is None) == bool(reason)
    if first.producer:
        assert first.producer == InputNorm("norm", ("norm.weight",), 1.0 if odd == "gain less one" else 0.0)
    assert second.no_producer == NO_NORM
    if odd != "tied":
        assert third.producer == InputNorm("layer_norm", ("layer_norm.weight", "layer_norm.bias"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_scales_are_those_that_the_stored_gain_can_hold(offset: float, dtype: torch.dtype) -> None:
    """gain · 1/s is exact in the stored dtype, s is near what was asked for, and a gain of 0 or one that would
    underflow to 0 keeps s = 1."""
    stored_I = (torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5 - offset).to(dtype)
    stored_I[3] = -offset
    parameters, producer = {"norm.weight": stored_I}, InputNorm("norm", ("norm.weight",), offset)
    wanted_I = random_scale_I(64, 2)
    wanted_I[5] = 1e30
    scale_I = producer.storable_I(parameters, wanted_I)
    new_I = producer.divided(parameters, scale_I)["norm.weight"]
    gain_I, new_gain_I = (each.double() + offset for each in (stored_I, new_I))
    torch.testing.assert_close(new_gain_I * scale_I, gain_I, rtol=1e-12, atol=0)
    assert scale_I[3] == 1
    assert (scale_I > 0).all()
    assert scale_I.isfinite().all()
    usual = [i for i in range(64) if i not in (3, 5)]
    torch.testing.assert_close(scale_I[usual], wanted_I[usual], rtol=8 * torch.finfo(dtype).eps, atol=0)
    if dtype == torch.float16:
        assert scale_I[5] == 1
