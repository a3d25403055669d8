"""Claim: packed mixtures of experts are as small as llm-compressor's, with the same names and config.

    python benchmarks/packed_size.py

Four tiny mixture-of-experts models in bfloat16, rounded to nearest at 4 bits with 32 inputs per scale, by both tools;
llm-compressor in its own environment (`vs_peers.py`). Compared are bytes of the weight files, names and shapes of
tensors, and every field of `quantization_config`; differences are printed. transformers cannot load packed GPT-OSS
experts: crosscal writes them dense, and reports it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from records import record, write
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig
from vs_peers import HERE, peer_python

from crosscal.compressors import COMPRESSORS, LayerProblem
from crosscal.models import Ints, ModelSource, VariantWriter, quantization_config
from crosscal.models.walk import survey

BITS, GROUP_SIZE = 4, 32
COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip
IMPLIED = {
    "actorder": None, "block_structure": None, "observer_kwargs": {}, "scale_dtype": None, "zp_dtype": None,
    "input_activations": None, "output_activations": None, "kv_cache_scheme": None, "global_compression_ratio": None,
    "sparsity_config": {}, "transform_config": {},
}  # fmt: skip
"""Values of fields that a config leaves out. vLLM refuses some configs that have `sparsity_config`."""


def configs() -> dict[str, PretrainedConfig]:
    t = transformers
    latent = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    routed = {"n_routed_experts": 8, "moe_intermediate_size": 128, "n_group": 2, "topk_group": 1}
    return {
        "Qwen3-MoE": t.Qwen3MoeConfig(**COMMON, num_experts=8, moe_intermediate_size=128, head_dim=32),
        "Mixtral": t.MixtralConfig(**COMMON, num_local_experts=8),
        "DeepSeek-V3": t.DeepseekV3Config(
            **COMMON | {"num_key_value_heads": 4}, **latent, **routed, first_k_dense_replace=1
        ),
        "GPT-OSS": t.GptOssConfig(**COMMON, num_local_experts=8, head_dim=32),
    }


def ours(model: Path, out: Path) -> None:
    source = ModelSource.open(model)
    writer = VariantWriter(out, source)
    for block, found in enumerate(survey(source)):
        parameters, packed = source.load_block(block), {}
        for matrix in (matrix for site in found.sites for matrix in site.matrices):
            if not source.packing.why_dense(f"{source.block_name(block)}.{matrix.parameter}"):
                weight_OI = matrix.weight_OI(parameters)
                problem = LayerProblem(matrix.name, weight_OI.float(), torch.eye(weight_OI.shape[1]))
                grid = COMPRESSORS["rtn"](bits=BITS, group_size=GROUP_SIZE).compress(problem).grid
                assert grid is not None
                packed[matrix] = Ints(grid.ints_OI, grid.scale_OG.to(weight_OI.dtype), BITS)
        writer.write_block(block, {}, packed=packed)
    writer.finish(quantization_config(BITS, GROUP_SIZE, []))


def theirs(model: Path, out: Path) -> None:
    job = json.dumps({"model": str(model), "out": str(out), "bits": BITS, "group_size": GROUP_SIZE})
    subprocess.run([peer_python(), str(HERE / "pack_llmcompressor.py"), job], check=True, capture_output=True)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return found


def fields(value: Any, path: str = "") -> dict[str, Any]:
    """Return every field of a config by its path, lists as sets."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in fields(inner, f"{path}.{name}").items()}
    return {path: set(value) if isinstance(value, list) else value}


def differing(folders: tuple[Path, Path]) -> dict[str, tuple[Any, Any]]:
    """Return the fields of `quantization_config` with different meanings."""
    both = [fields(json.loads((f / "config.json").read_text())["quantization_config"]) for f in folders]

    def meant(one: dict[str, Any], path: str) -> Any:
        return one.get(path, IMPLIED.get(path.rpartition(".")[2]))

    return {
        path: (meant(both[0], path), meant(both[1], path))
        for path in sorted(both[0] | both[1])
        if meant(both[0], path) != meant(both[1], path)
    }


def main() -> None:
    rows = []
    for family, config in configs().items():
        with tempfile.TemporaryDirectory() as name:
            model, *folders = (Path(name) / part for part in ("model", "ours", "theirs"))
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
            ours(model, folders[0])
            theirs(model, folders[1])
            sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders]
            tensors = [shapes(folder) for folder in folders]
            fields_apart = differing((folders[0], folders[1]))
        alike = sum(tensors[1].get(key) == shape for key, shape in tensors[0].items())
        rows += [
            record(family, "crosscal", sizes[0], "bytes"),
            record(family, "llm-compressor", sizes[1], "bytes"),
            record(family, "crosscal / llm-compressor", sizes[0] / sizes[1], ""),
            record(family, "tensors of equal name and shape", alike / max(map(len, tensors)), "of all"),
            record(family, "config fields that differ", len(fields_apart), "fields"),
        ]
        print(f"{family}: {sizes[0]:,} and {sizes[1]:,} bytes; {alike} of {[*map(len, tensors)]} tensors alike")
        print(f"  names only in one: {sorted(tensors[0].keys() ^ tensors[1].keys())[:4]}")
        print("\n".join(f"  {path}: {values[0]} and {values[1]}" for path, values in fields_apart.items()))
    write("packed_size", rows)


if __name__ == "__main__":
    main()
