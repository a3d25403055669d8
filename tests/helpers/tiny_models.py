"""Tiny seeded models of many families, saved as real checkpoints, and a plain reference of their matrices' inputs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCABULARY = 96
WINDOW = 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in COMMON.items() if key not in names}


def configs() -> dict[str, PretrainedConfig]:
    t = transformers
    mixture = {**COMMON, **EXPERTS, "intermediate_size": 24}
    no_groups = _without("num_key_value_heads")
    falcon = {**_without("intermediate_size", "num_key_value_heads"), "bias": True}
    return {
        "llama": t.LlamaConfig(**COMMON),
        "llama-tied": t.LlamaConfig(**COMMON, tie_word_embeddings=True),
        "mistral": t.MistralConfig(**COMMON, sliding_window=8),
        "qwen2": t.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "qwen3": t.Qwen3Config(**COMMON, head_dim=8),
        "gemma2": t.Gemma2Config(**COMMON, **SLIDING, head_dim=8),
        "gemma3": t.Gemma3TextConfig(**COMMON, **SLIDING, head_dim=8),
        "phi": t.PhiConfig(**COMMON),
        "phi3": t.Phi3Config(**COMMON),
        "opt": t.OPTConfig(**_without("intermediate_size", "num_key_value_heads"), ffn_dim=48, word_embed_proj_dim=16),
        "gpt2": t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48, bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt-neox": t.GPTNeoXConfig(**no_groups),
        "falcon-parallel": t.FalconConfig(**falcon, parallel_attn=True, multi_query=True, alibi=False),
        "falcon-new": t.FalconConfig(**falcon, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
        "falcon-alibi": t.FalconConfig(**falcon, parallel_attn=False, multi_query=False, alibi=True),
        "mixtral": t.MixtralConfig(**mixture, num_local_experts=4),
        "qwen3-moe": t.Qwen3MoeConfig(
            **mixture, num_experts=4, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[1]
        ),
        "qwen2-moe": t.Qwen2MoeConfig(
            **mixture, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40
        ),
        "deepseek-v3": t.DeepseekV3Config(
            **{**mixture, "num_key_value_heads": 4}, n_routed_experts=4, moe_intermediate_size=24, n_group=2,
            topk_group=1, kv_lora_rank=24, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=1,
        ),
        "bloom": t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
        "gpt-oss": t.GptOssConfig(**mixture, **SLIDING, num_local_experts=4, head_dim=8),
    }  # fmt: skip


FAMILIES = tuple(configs())


def wide_configs() -> dict[str, PretrainedConfig]:
    """Families whose experts' input sizes are multiples of 32, as mxfp4 requires."""
    mixture = {**COMMON, **EXPERTS, "intermediate_size": 64}
    return {"gpt-oss-wide": transformers.GptOssConfig(**mixture, **SLIDING, num_local_experts=4, head_dim=8)}


def save_model(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> Path:
    """Save a checkpoint of a family; its random weights are large, so that no layer is nearly linear or zero."""
    config = (configs() | wide_configs())[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_random(parameter.shape) * scale)
    model.save_pretrained(folder)
    return folder


def _random(shape: torch.Size) -> Tensor:
    return 0.3 * torch.randn(shape) if len(shape) > 1 else 1.0 + 0.1 * torch.randn(shape)


def windows(count: int, *, seed: int = 0, length: int = WINDOW) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def load_plain(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def plain_grams(model: PreTrainedModel, tokens_SL: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return XᵀX and the token count of every matrix of the full model by name; one forward pass per window."""
    grams: dict[str, Tensor] = {}
    tokens: dict[str, int] = defaultdict(int)

    def add(name: str, input_TI: Tensor) -> None:
        rows_TI = input_TI.reshape(-1, input_TI.shape[-1])
        grams[name] = grams.get(name, 0) + rows_TI.T @ rows_TI
        tokens[name] += len(rows_TI)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])))
        elif name.endswith(".experts"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: _add_experts(name, module, (*args, *kwargs.values()), add),
                    with_kwargs=True,
                )
            )
    for window_L in tokens_SL:
        model(input_ids=window_L[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return grams, dict(tokens)


def _add_experts(name: str, module: nn.Module, args: tuple[Any, ...], add: Any) -> None:
    """Add the experts' inputs token by token, by the formulas of Mixtral, Qwen3-MoE and GPT-OSS."""
    hidden_TH, chosen_TK = args[0].reshape(-1, args[0].shape[-1]), args[1]
    for row_H, chosen_K in zip(hidden_TH, chosen_TK, strict=True):
        for expert in chosen_K.tolist():
            if hasattr(module, "gate_up_proj_bias"):
                both = row_H @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
                inner = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
            else:
                gate, up = (module.gate_up_proj[expert] @ row_H).chunk(2)
                inner = gate * torch.sigmoid(gate) * up
            add(f"{name}.{expert}.gate_up_proj", row_H[None])
            add(f"{name}.{expert}.down_proj", inner[None])
