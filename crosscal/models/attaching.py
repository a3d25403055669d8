"""Put tensors into a module temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from crosscal.errors import ModelError


@contextmanager
def attached(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors into a module, such as one on the meta device; restore its previous ones afterwards."""
    empty = module.state_dict()
    unknown = sorted(tensors.keys() - empty.keys())
    if unknown:
        raise ModelError(
            "these are not names of tensors of the module", where=type(module).__name__, got=", ".join(unknown[:4])
        )
    module.load_state_dict(tensors, strict=False, assign=True)
    try:
        yield
    finally:
        module.load_state_dict({name: empty[name] for name in tensors}, strict=False, assign=True)
