"""Lookup of CUDA kernels in `native_functions.yaml`, the table torch is generated from; torch's wheels contain it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torchgen
import yaml

TABLE = "packaged/ATen/native/native_functions.yaml"


def has_cuda_kernel(operation: Any) -> bool:
    """Return whether an operation has a CUDA kernel; True as well if it is composite or generated without an entry."""
    entry = _entries().get(operation.name().removeprefix("aten::"), {})
    entry = _entries().get(entry.get("structured_delegate"), entry)
    if "dispatch" not in entry or "ufunc_inner_loop" in entry:
        return True
    backends = {backend.strip() for backends in entry["dispatch"] for backend in backends.split(",")}
    return "CUDA" in backends or any(backend.startswith("Composite") for backend in backends)


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    """Entries of the table by name with overload, e.g. `mm.dtype`."""
    text = (Path(torchgen.__file__).parent / TABLE).read_text(encoding="utf-8")
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(text, Loader=yaml.CSafeLoader)}
