"""Checkpoints whose matrices are stored in 8 or 4 bits with scales: each tensor is decoded while it is read.

transformers' own code decodes fp8 and mxfp4. Variants do not keep the source's encoding: they are written dense in the
config's dtype, or packed by a recipe. Linears packed by a recipe are decoded the same way when a compressed model is
measured block by block; calibrating such a model is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from crosscal.errors import ModelError
from crosscal.models.export import PACKED, unpacked_weight_OI
from crosscal.models.tensor_files import Encoded

FP8, MXFP4 = "fp8", "mxfp4"
ENCODINGS = {FP8: "8-bit floats with a scale for each tile", MXFP4: "4-bit floats with a scale for 32 of them"}
SCALE = "_scale_inv"
UNUSED = (".activation_scale", ".input_scale")
"""Scales with which an inference engine quantizes activations: not part of the weights."""


def encoding_of(quantization: Mapping[str, Any] | None) -> str | None:
    """Return the encoding in a config's `quantization_config`, or None if it is not one of `ENCODINGS`."""
    method = (quantization or {}).get("quant_method")
    return method if method in ENCODINGS else None


def encoded_tensors(
    files: Mapping[str, Path], quantization: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Encoded]:
    """Return the encoded tensors of a checkpoint, by the names that they would have in a dense one."""
    if (bits := packed_bits(quantization)) is not None:
        linears = [key.removesuffix(f".{PACKED[0]}") for key in files if key.endswith(f".{PACKED[0]}")]
        unpack = partial(_from_packed, bits=bits, dtype=dtype)
        return {f"{linear}.weight": Encoded(tuple(f"{linear}.{part}" for part in PACKED), unpack) for linear in linears}
    if encoding_of(quantization) == MXFP4:
        names = [key.removesuffix("_blocks") for key in files if key.endswith("_blocks")]
        decode = partial(_from_mxfp4, dtype=dtype)
        return {name: Encoded((f"{name}_blocks", f"{name}_scales"), decode) for name in names}
    tile = quantization.get("weight_block_size") or None
    names = [key for key in files if f"{key}{SCALE}" in files]
    return {name: Encoded((name, f"{name}{SCALE}"), partial(_from_fp8, tile=tile, dtype=dtype)) for name in names}


def packed_bits(quantization: Mapping[str, Any] | None) -> int | None:
    """Return the bits in a config's `quantization_config` if its linears are packed as in `export.py`, else None."""
    said = quantization or {}
    groups = list((said.get("config_groups") or {}).values())
    if (said.get("quant_method"), said.get("format"), len(groups)) != ("compressed-tensors", "pack-quantized", 1):
        return None
    weights = groups[0].get("weights") or {}
    further = [groups[0].get("input_activations"), groups[0].get("output_activations"), weights.get("actorder")]
    further += [said.get(name) for name in ("kv_cache_scheme", "sparsity_config", "transform_config")]
    is_plain = weights.get("type") == "int" and weights.get("symmetric") and not weights.get("dynamic")
    return weights.get("num_bits") if is_plain and not any(further) else None


def without_unused(files: Mapping[str, Path]) -> dict[str, Path]:
    return {key: file for key, file in files.items() if not key.endswith(UNUSED)}


def _from_packed(packed: Tensor, scale_OG: Tensor, shape: Tensor, *, bits: int, dtype: torch.dtype) -> Tensor:
    """Unpack a weight and round it to the checkpoint's dtype, as loading the whole model does."""
    return unpacked_weight_OI(packed, scale_OG, shape, bits).to(dtype)


def _from_mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    return convert_moe_packed_tensors(blocks, scales, dtype=dtype).contiguous()


def _from_fp8(weight: Tensor, scales: Tensor, *, tile: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Multiply each number by the scale of its tile. Shapes: [..., R, C], and [..., R / tile, C / tile] rounded up. The
    last tile of rows or columns may be incomplete; it is padded, or transformers' code would infer smaller tiles."""
    size, tiles = weight.shape[-2:], scales.shape[-2:]
    padding = [0, 0]
    if tile is not None and tuple(tiles) == tuple(-(-n // side) for n, side in zip(size, tile, strict=True)):
        padding = [count * side - n for count, side, n in zip(tiles, tile, size, strict=True)]
        weight = functional.pad(weight.view(torch.uint8), (0, padding[1], 0, padding[0])).view(weight.dtype)
    try:
        decoded = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=dtype)
    except ValueError as error:
        got = f"shape {tuple(weight.shape)}, scales {tuple(scales.shape)}, tiles of {tile}"
        raise ModelError("the scales do not fit the matrix that they belong to", got=got) from error
    return decoded[..., : size[0], : size[1]].contiguous() if any(padding) else decoded
