"""What losses are relative to: tr(W H Wᵀ) of every matrix of a block, on the calibration and on the held-out windows.

No setting of a method enters it, so it is computed once per mixture and kept beside the moments it comes from: two of
the three products that the losses of one more variant would take. Inputs that come through a variant's own compressed
blocks belong to that variant alone, and are not kept.
"""

from __future__ import annotations

import json
from typing import Any

from crosscal.stages.moments import DENSE, Cached
from crosscal.store import digest_of

FORMAT = 1  # a change of what is computed makes new keys
KIND = "energies"
FILE = "energies.json"


class Energies:
    """Of one block's matrices under one mixture, by the matrices' names: (calibration, held-out or None)."""

    def __init__(self, cached: Cached, block: int, mixture: Any) -> None:
        """`mixture`: what determines the Hessians, besides model and block: sets, weights and their normalisation."""
        self._cached, self._block = cached, block
        self._key = digest_of([FORMAT, cached.model, cached.dtype, block, mixture])
        self._artifact = cached.store.find(KIND, self._key) if cached.upstream == DENSE else None
        stored = cached.store.read_bytes(self._artifact, FILE) if self._artifact else b"{}"
        self._known: dict[str, tuple[float, float | None]] = {
            name: (calibration, held_out) for name, (calibration, held_out) in json.loads(stored).items()
        }

    def get(self, matrix: str) -> tuple[float, float | None] | None:
        return self._known.get(matrix)

    def add(self, matrix: str, calibration: float, held_out: float | None) -> None:
        self._known.setdefault(matrix, (calibration, held_out))

    def keep(self, matrices: int) -> None:
        """Store them, once they are those of all so many matrices."""
        if self._cached.upstream == DENSE and self._artifact is None and len(self._known) == matrices:
            provenance = {"model": self._cached.model, "block": self._block, "dtype": self._cached.dtype}
            with self._cached.store.publish(KIND, self._key, provenance) as folder:
                (folder / FILE).write_text(json.dumps(self._known))
