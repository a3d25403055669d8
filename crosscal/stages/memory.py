"""How much memory there is."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device | str) -> int:
    """What a device has free now."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
