"""Tiny configurations of every model type of transformers that has a causal language model, and of multimodal wrappers.

A type's default config is shrunk by field names: a width becomes tiny wherever it occurs, in the config of the language
model and in those of its towers. `MORE` has what a family needs beyond that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96


@dataclass(frozen=True)
class Sizes:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_inner: int
    shared_inner: int
    blocks: int = 2


ORDINARY = Sizes(hidden=32, inner=48, heads=4, kv_heads=2, head_dim=8, experts=4, expert_inner=24, shared_inner=40)
COINCIDING = Sizes(hidden=32, inner=32, heads=4, kv_heads=4, head_dim=8, experts=32, expert_inner=32, shared_inner=32)
"""Sizes coincide, so that no dimension can be identified by its size."""
ODD = Sizes(hidden=40, inner=56, heads=4, kv_heads=2, head_dim=10, experts=3, expert_inner=28, shared_inner=20)
SIZES = {"ordinary": ORDINARY, "coinciding": COINCIDING, "odd": ODD}

WRAPPERS = (
    "gemma3", "gemma3n", "gemma4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
    "qwen3_5_moe", "llava", "llava_next", "paligemma", "internvl", "idefics3", "smolvlm", "glm4v", "glm4v_moe",
    "aya_vision", "llama4", "mllama", "cohere2_vision",
)  # fmt: skip
"""Multimodal: a language model inside, and towers that are copied."""


def types() -> list[str]:
    """Return all model types, as spelled in `config.json`."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS]))


_WIDTHS = """
hidden: hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim hidden_size_global lru_width
  attention_hidden_size input_embedding_size output_embedding_size embedding_dim dim_model backbone_hidden_size
  pronunciation_embed_dim shape_embed_dim input_size projection_dim out_hidden_size kv_lora_rank q_lora_rank o_lora_rank
inner: intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dim_ff n_inner d_ff d_inner dff ffn_hidden_size
  feed_forward_size intermediate_size_mlp dense_intermediate_size moe_dense_intermediate_size mlp_dim
blocks: num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
  num_encoder_layers num_blocks depth num_layers_per_stack num_global_layers
heads: num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
  num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads
  linear_num_heads index_n_heads
kv_heads: num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups linear_num_key_heads
  num_global_key_value_heads
head_dim: head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim kv_channels d_kv d_head dim_head swa_head_dim
  attention_head_size linear_key_head_dim linear_value_head_dim linear_head_dim rotary_dim index_head_dim
  global_head_dim swa_v_head_dim
experts: num_experts num_local_experts n_routed_experts moe_num_experts
expert_inner: moe_intermediate_size expert_ffn_hidden_size
shared_inner: shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
  shared_experts_intermediate_size
"""
_NUMBERS = """
96: vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size audio_vocab_size
  pronunciation_vocab_size shape_vocab_size n_words
64: max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions max_source_positions
  model_max_length original_max_position_embeddings position_embedding_size
16: image_size num_position_embeddings
8: sliding_window sliding_window_size window_size attention_window_size local_attention index_topk laurel_rank
  hidden_size_per_layer_input adapter_rank d_rel state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size
  attention_chunk_size query_pre_attn_scalar rel_extent
5: unk_token_id
4: patch_size spatial_patch_size cls_token_id
3: sep_token_id
2: num_experts_per_tok top_k moe_topk moe_k num_experts_per_token moe_top_k num_selected_experts top_k_experts
  eos_token_id
1: first_k_dense_replace n_group topk_group num_shared_experts n_shared_experts bos_token_id
0: pad_token_id
"""


def _fields(sizes: Sizes) -> dict[str, Any]:
    """Field name -> value, at any level of a config."""
    fields: dict[str, Any] = {"qk_head_dim": 2 * sizes.head_dim}
    for width, names in _by_key(_WIDTHS):
        fields |= dict.fromkeys(names, getattr(sizes, width))
    for number, names in _by_key(_NUMBERS):
        fields |= dict.fromkeys(names, int(number))
    return fields | {name: VOCABULARY - 2 - place for place, name in enumerate(_MARKS.split())}


def _by_key(table: str) -> Iterator[tuple[str, list[str]]]:
    for entry in re.split(r"\n(?=\S)", table.strip()):
        key, _, names = entry.partition(":")
        yield key, names.split()


_MARKS = """
image_token_id video_token_id audio_token_id boi_token_id eoi_token_id boa_token_id vision_start_token_id
vision_end_token_id image_token_index boi_token_index eoi_token_index eoa_token_id eoa_token_index
image_start_token_id image_end_token_id video_start_token_id video_end_token_id video_token_index audio_token_index
"""
"""Fields of multimodal models with token ids that no text contains."""
_TOWERS = ("vision", "audio", "image", "speech")
_TOWER = Sizes(16, 24, heads=2, kv_heads=2, head_dim=8, experts=4, expert_inner=8, shared_inner=8, blocks=1)


def _text(kind: str, **more: Any) -> Any:
    return lambda s: {"model_type": kind, **_shrunk(CONFIG_MAPPING[kind], kind, s, is_tower=False), **more}


def _tower(kind: str, **more: Any) -> Any:
    return lambda s: {"model_type": kind, **_shrunk(CONFIG_MAPPING[kind], kind, s, is_tower=True), **more}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
_CLIP, _SIGLIP = _tower("clip_vision_model"), _tower("siglip_vision_model")

MORE: dict[str, dict[str, Any]] = {
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [0], "adapter_in_dim": 16, "adapter_out_dim": lambda s: s.hidden,
    },
    "qwen2_vl_vision": {"embed_dim": 16},
    "axk1": {"mlp_layer_types": ["dense", "sparse"]},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 4},
    "blt": {"vocab_size": VOCABULARY, "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: dict(_ROPE) for kind in ("sliding_attention", "full_attention")},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": lambda s: {"ffn_hidden_size": s.expert_inner, "moe_num_experts": s.experts, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": lambda s: 2 * s.hidden, "mamba_n_heads": 4, "mamba_d_head": lambda s: s.hidden // 2},
    "fuyu": {"text_config": _text("persimmon"), "patch_size": 4, "image_size": 16},
    "gemma3": {"vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "gemma3n": {"text_config": _text("gemma3n_text", num_kv_shared_layers=0)},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_text": _MROPE,
    "glm4v_moe_text": {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}},
    "got_ocr2": {"text_config": _text("qwen2")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "jamba": {
        "mamba_dt_rank": 20, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"time_step_rank": 20},
    "falcon_mamba": {"time_step_rank": 20},
    "mamba2": {"num_heads": 4, "head_dim": lambda s: s.hidden // 2, "n_groups": 1},
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": lambda s: s.hidden // 2, "n_groups": 1,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "moss_transcribe_diarize": {"text_config": _text("qwen3")},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen3_vl_text": _MROPE,
    "qwen3_vl_moe_text": _MROPE,
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_shape": [8, 8], "local_attn_chunk_length": 8,
        "axial_pos_embds_dim": lambda s: [8, s.hidden - 8],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 4,
        "attention_hidden_size": lambda s: 2 * s.hidden, "attention_head_dim": lambda s: s.hidden // 2,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": lambda s: s.hidden},
    "mistral3": {"text_config": _text("mistral"), "vision_config": _tower("pixtral")},
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP},
    "llava_next": {"text_config": _text("llama"), "vision_config": _CLIP, "image_grid_pinpoints": [[16, 16]]},
    "paligemma": {"text_config": _text("gemma"), "vision_config": _SIGLIP},
    "internvl": {"text_config": _text("qwen2")},
    "idefics3": {"text_config": _text("llama")},
    "smolvlm": {"text_config": _text("llama")},
    "aya_vision": {"text_config": _text("cohere2"), "vision_config": _SIGLIP},
    "cohere2_vision": {
        "text_config": _text("cohere2"), "vision_config": _SIGLIP, "alignment_intermediate_size": 32,
    },
}  # fmt: skip
"""Type -> further config fields; a function computes its value from the sizes."""


def shrunk(kind: str, sizes: Sizes) -> PretrainedConfig:
    """Return a tiny config of a type."""
    return CONFIG_MAPPING[kind](**_shrunk(CONFIG_MAPPING[kind], kind, sizes, is_tower=False))


def _shrunk(config_class: Any, kind: str, sizes: Sizes, *, is_tower: bool) -> dict[str, Any]:
    more = {name: value(sizes) if callable(value) else value for name, value in MORE.get(kind, {}).items()}
    fields = _fields(_TOWER if is_tower else sizes)
    names = {field.name for field in dataclasses.fields(config_class)}
    found = {name: value for name, value in fields.items() if name in names}
    if "kv_lora_rank" in names:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if "is_decoder" in names:
        found["is_decoder"] = True
    for part, of_part in config_class.sub_configs.items():
        if part in more:
            continue
        in_tower = any(tower in part for tower in _TOWERS)
        if of_part.__name__ == "AutoConfig":
            continue
        found[part] = _shrunk(of_part, of_part.model_type, sizes, is_tower=in_tower)
    return found | more


def save(kind: str, sizes: Sizes, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Save a checkpoint with random weights, large enough that nothing is close to linear or to zero. Raises the error
    of transformers if it cannot build or run the model."""
    config = shrunk(kind, sizes)
    maps = (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    model_class = next(
        found[type(config)] for found in (maps if kind in WRAPPERS else maps[::-1]) if type(config) in found
    )
    text = config.sub_configs.get("text_config")
    if text is not None and model_class.config_class == text:
        config = config.get_text_config()
    torch.manual_seed(0)
    model: PreTrainedModel = model_class._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # DeepSeek-V4: the experts of each token id
                buffer.copy_(torch.rand(len(buffer), sizes.experts).argsort(-1)[:, : buffer.shape[1]])
        model.eval()(input_ids=torch.arange(6, 30)[None], use_cache=False)  # raises if it cannot run
    model.to(dtype).save_pretrained(folder)
