"""Available memory."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device | str) -> int:
    """Return the free memory of a device."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def usable_bytes(device: torch.device | str) -> int:
    """Return the free memory of a device; on a GPU including what torch has reserved and does not use."""
    idle = 0
    if (device := torch.device(device)).type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_bytes(device) + idle
