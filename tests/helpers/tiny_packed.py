"""Tiny models of families with special cases in packing: see `tests/test_models_packing.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.helpers.tiny_models import COMMON, VOCABULARY


def configs() -> dict[str, PretrainedConfig]:
    t = transformers
    recurrent: Any = {"num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 16}
    return {
        "gpt-bigcode": t.GPTBigCodeConfig(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, bos_token_id=1,
            eos_token_id=2,
        ),
        "mamba2": t.Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8,
            n_groups=2, chunk_size=8,
        ),
        "nanochat": t.NanoChatConfig(**COMMON),
        "rwkv": t.RwkvConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, intermediate_size=48, context_length=64
        ),
        "recurrent-gemma": t.RecurrentGemmaConfig(**COMMON | recurrent),
        "laguna": t.LagunaConfig(
            **COMMON | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24, "num_attention_heads_per_layer": [4, 4, 4]}
        ),
    }  # fmt: skip


def save(family: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()[family], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
    model.save_pretrained(folder)
    return folder
