"""Quantized linears in the compressed-tensors `pack-quantized` format, which transformers and vLLM load.

Shapes: O outputs, I inputs, G groups of inputs that share a scale (1: one scale per row).

Symmetric grids only: weight = integer * scale, integers in [-2**(bits-1), 2**(bits-1) - 1].
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor, nn

from crosscal.errors import ModelError

VERSION = importlib.metadata.version("compressed-tensors")
"""Earlier versions pack integers of 3, 5, 6 and 7 bits differently."""
PACKED = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True, eq=False)
class Ints:
    """A quantized matrix to be stored packed; its weights are ints_OI · scale_OG, in the scale's dtype."""

    ints_OI: Tensor
    scale_OG: Tensor
    bits: int


def packed_tensors(name: str, ints_OI: Tensor, scale_OG: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the packed tensors of linear `name`, which load as exactly `ints_OI * scale_OG`, in the scale's dtype.

    Raises `ModelError` for integers outside the range of `bits`."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if int(ints_OI.min()) < lowest or int(ints_OI.max()) > highest:
        raise ModelError(f"integers of {bits} bits lie between {lowest} and {highest}", where=name, got=_range(ints_OI))
    return {
        f"{name}.weight_packed": pack_to_int32(ints_OI.to("cpu", torch.int8), bits),
        f"{name}.weight_scale": scale_OG.cpu().contiguous(),
        f"{name}.weight_shape": torch.tensor(ints_OI.shape),
    }


def unpacked_weight_OI(packed: Tensor, scale_OG: Tensor, shape: Tensor, bits: int) -> Tensor:
    """Return the dense weights of packed tensors, in the scale's dtype."""
    outputs, inputs = shape.tolist()
    ints_OI = unpack_from_int32(packed, bits, torch.Size((outputs, inputs)))
    return (ints_OI.view(outputs, scale_OG.shape[1], -1).to(scale_OG.dtype) * scale_OG[..., None]).view(outputs, inputs)


def quantization_config(bits: int, group_size: int | None, ignore: Iterable[str]) -> dict[str, Any]:
    """Return `quantization_config` of `config.json`. `ignore`: every linear that stays dense (see `dense_linears`)."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        "ignore": sorted(ignore),
    }


def dense_linears(model: nn.Module, packed: Iterable[str]) -> list[str]:
    """Return the names of unpacked modules that a loader might mistake for packed linears: every `nn.Linear` and every
    router that is not in `packed`."""
    quantized = set(packed)
    return [name for name, module in model.named_modules() if name not in quantized and _is_like_linear(module)]


def _is_like_linear(module: nn.Module) -> bool:
    """Routers are special modules with a `weight` in transformers, and linears elsewhere."""
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) or (
        weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
    )


def _range(ints: Tensor) -> str:
    return f"{int(ints.min())} to {int(ints.max())}"
