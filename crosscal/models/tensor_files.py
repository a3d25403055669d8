"""Files of tensors that appear whole or not at all, and what the folder of an adapter is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from crosscal.files import whole_file

ADAPTER, ADAPTER_CONFIG = "adapter", "adapter_config.json"


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    with whole_file(file) as aside:
        save_file({key: _own(tensor) for key, tensor in tensors.items()}, aside, metadata={"format": "pt"})


def _own(tensor: Tensor) -> Tensor:
    """A tensor that is all of its storage, as the file format asks."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
