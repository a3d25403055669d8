"""Matrices left dense, by a fallback or by design: their number accompanies every number of their variant.

Such a matrix loses nothing because nothing was done to it. Its zero is not a result: it enters no mean, and a variant
that leaves more of the model dense than others is not compared with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from crosscal.report.numbers import percent_text
from crosscal.report.rows import LayerRow

SLACK = 0.01
"""Share of the parameters that a compared variant may leave dense beyond the least at its level."""


@dataclass(frozen=True)
class DenseShare:
    """How much of a variant's listed matrices stays dense, over all its seeds."""

    matrices: int
    of_matrices: int
    parameters: int | None
    """None if rows of an older version do not give the size of their matrices."""
    of_parameters: int | None

    @property
    def share(self) -> float:
        """Share of the parameters of all listed matrices; of their number if sizes are not known."""
        if self.parameters is not None and self.of_parameters:
            return self.parameters / self.of_parameters
        return self.matrices / self.of_matrices if self.of_matrices else 0.0

    @property
    def text(self) -> str:
        """As in "2 of 28 matrices, 7.14 % of their parameters"; empty where all were solved."""
        if not self.matrices:
            return ""
        counted = f"{self.matrices} of {self.of_matrices} matrices"
        return counted if self.parameters is None else f"{counted}, {percent_text(self.share)} of their parameters"

    @property
    def short(self) -> str:
        """As in "2 (7.14 %)", without the share where sizes are not known."""
        return self._with_share(str(self.matrices))

    @property
    def cell(self) -> str:
        """As in "2 of 28 (7.14 %)"."""
        return self._with_share(f"{self.matrices} of {self.of_matrices}")

    def _with_share(self, counted: str) -> str:
        if not self.matrices:
            return ""
        return counted if self.parameters is None else f"{counted} ({percent_text(self.share)})"


NOTHING = DenseShare(0, 0, None, None)
"""For variants without layer rows."""


def left_dense_of(layers: Sequence[LayerRow]) -> DenseShare:
    """Count over the layer rows of one variant, or of its seeds."""
    dense = [row for row in layers if row.stays_dense]
    parameters, of_parameters = (
        None if any(row.parameters is None for row in layers) else sum(row.parameters or 0 for row in rows)
        for rows in (dense, layers)
    )
    return DenseShare(len(dense), len(layers), parameters, of_parameters)


class _Compressed(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def is_dense(self) -> bool: ...
    @property
    def level(self) -> str: ...
    @property
    def left_dense(self) -> DenseShare: ...


G = TypeVar("G", bound=_Compressed)


def compared(groups: Sequence[G]) -> dict[str, list[G]]:
    """Return level -> the compressed groups whose numbers are comparable, in the order of their first appearance.

    A group that leaves over SLACK more dense than the least of its level is compressed less than the level states, and
    one that leaves everything dense is not compressed at all.
    """
    levels: dict[str, list[G]] = defaultdict(list)
    for group in groups:
        if not group.is_dense and group.left_dense.share < 1:
            levels[group.level].append(group)
    least = {level: min(group.left_dense.share for group in found) for level, found in levels.items()}
    return {
        level: [group for group in found if group.left_dense.share <= least[level] + SLACK]
        for level, found in levels.items()
    }


def marks_of(groups: Sequence[_Compressed]) -> Mapping[str, str]:
    """Return name -> label of a point, for groups with matrices left dense; empty if all groups have the same counts,
    which `common_text` then states once."""
    if len({group.left_dense for group in groups if not group.is_dense}) < 2:
        return {}
    return {group.name: f"{group.left_dense.short} dense" for group in groups if group.left_dense.matrices}


def common_text(groups: Sequence[_Compressed]) -> str:
    """Return a sentence on what charts do not show at each point; empty if every matrix was solved."""
    kinds = {group.left_dense for group in groups if not group.is_dense}
    if not any(kind.matrices for kind in kinds):
        return ""
    if len(kinds) == 1:
        return f"In every variant {next(iter(kinds)).text} stay dense."
    return "Where matrices of a variant stay dense, their number and share of parameters stand beside it."
