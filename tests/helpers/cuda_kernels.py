"""Which of torch's operations have a CUDA kernel, by the table that torch is generated from, which its wheels hold."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torchgen
import yaml

TABLE = "packaged/ATen/native/native_functions.yaml"


def has_cuda_kernel(operation: Any) -> bool:
    """True also for one that is composed of others, and for what is generated from an operation without an entry."""
    entry = _entries().get(operation.name().removeprefix("aten::"), {})
    entry = _entries().get(entry.get("structured_delegate"), entry)
    if "dispatch" not in entry or "ufunc_inner_loop" in entry:
        return True
    backends = {backend.strip() for backends in entry["dispatch"] for backend in backends.split(",")}
    return "CUDA" in backends or any(backend.startswith("Composite") for backend in backends)


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    """By the name with its overload, e.g. `mm.dtype`."""
    text = (Path(torchgen.__file__).parent / TABLE).read_text(encoding="utf-8")
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(text, Loader=yaml.CSafeLoader)}
