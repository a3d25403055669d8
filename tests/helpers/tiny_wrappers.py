"""Tiny seeded multimodal checkpoints: a language model and a vision tower, saved under the wrapper's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tests.helpers.tiny_models import COMMON

TEXT = {**COMMON, "num_hidden_layers": 2, "head_dim": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MIXTURE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def configs() -> dict[str, PretrainedConfig]:
    t = transformers
    marks = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return {
        "qwen3.5": t.Qwen3_5Config(text_config=TEXT | LINEAR, vision_config=VISION, **marks),
        "qwen3.5-moe": t.Qwen3_5MoeConfig(text_config=TEXT | LINEAR | MIXTURE, vision_config=VISION, **marks),
        "gemma3-vision": t.Gemma3Config(
            text_config=TEXT, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=90, boi_token_index=91,
            eoi_token_index=92,
        ),
    }  # fmt: skip


CLASSES = {
    "qwen3.5": "Qwen3_5ForConditionalGeneration",
    "qwen3.5-moe": "Qwen3_5MoeForConditionalGeneration",
    "gemma3-vision": "Gemma3ForConditionalGeneration",
}
WRAPPERS = tuple(CLASSES)


def save_wrapper(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    kind: Any = getattr(transformers, CLASSES[family])
    model: PreTrainedModel = kind(configs()[family]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
    model.save_pretrained(folder)
    return folder
