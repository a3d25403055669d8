"""Losses by layer: the error of each solved matrix on calibration data and on held-out data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from crosscal.report.figure import COLOURS, drawing, legend_below, panels, svg_of
from crosscal.report.rows import LayerRow


def layer_losses(layers: Sequence[LayerRow], variants: Sequence[str], marks: Mapping[str, str]) -> str | None:
    """Plot for each variant the mean relative loss by block, calibration and held-out, and a map of each matrix's loss.

    Matrices left dense are in no mean and blank on the map; `marks` gives their number per variant. None if the
    variants have no solved matrix with a loss in a block.
    """
    chosen = {
        variant: [row for row in layers if row.variant == variant and row.block is not None] for variant in variants
    }
    chosen = {variant: rows for variant, rows in chosen.items() if any(_is_measured(row) for row in rows)}
    if not chosen:
        return None
    with drawing("layers"):
        figure, axes = panels(2 * len(chosen), columns=2, height=2.9)
        for position, (name, rows) in enumerate(chosen.items()):
            _by_block(axes[2 * position], rows, f"{name} ({marks[name]})" if name in marks else name)
            _map(figure, axes[2 * position + 1], rows)
        handles = {line.get_label(): line for axis in axes[::2] for line in axis.get_lines()}
        legend_below(figure, list(handles.values()))
        return svg_of(figure)


def matrix_kind(row: LayerRow) -> str:
    """Return the matrix's name within its block: "self_attn.q_proj" for "model.layers.3.self_attn.q_proj"."""
    _, _, inside = row.layer.partition(f".{row.block}.")
    return inside or row.layer


def _is_measured(row: LayerRow) -> bool:
    return not row.stays_dense and row.relative_loss is not None


def _by_block(axis: Any, rows: Sequence[LayerRow], title: str) -> None:
    """Both lines cover the same matrices: those with a held-out loss, or all solved ones if none has."""
    solved = [row for row in rows if not row.stays_dense]
    both = [row for row in solved if row.heldout_relative_loss is not None]
    for label, colour, style, losses in (
        ("calibration", COLOURS[0], "--", _mean_by_block([(row.block, row.relative_loss) for row in both or solved])),
        ("held-out", COLOURS[3], "-", _mean_by_block([(row.block, row.heldout_relative_loss) for row in both])),
    ):
        if losses:
            axis.plot(list(losses), list(losses.values()), style, marker="o", color=colour, label=label)
    axis.set(title=title, xlabel="block", ylabel="mean relative loss", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)


def _mean_by_block(losses: Sequence[tuple[int | None, float | None]]) -> dict[int, float]:
    by_block: dict[int, list[float]] = defaultdict(list)
    for block, loss in losses:
        if block is not None and loss is not None:
            by_block[block].append(loss)
    return {block: math.fsum(found) / len(found) for block, found in sorted(by_block.items())}


def _map(figure: Any, axis: Any, rows: Sequence[LayerRow]) -> None:
    kinds = list(dict.fromkeys(matrix_kind(row) for row in rows))
    blocks = sorted({row.block for row in rows if row.block is not None})
    heldout = any(row.heldout_relative_loss is not None and not row.stays_dense for row in rows)
    loss_of = {(matrix_kind(row), row.block): _shown_loss(row, heldout=heldout) for row in rows}
    grid = [[loss_of.get((kind, block), math.nan) for block in blocks] for kind in kinds]
    mesh = axis.pcolormesh(grid, cmap="cividis", vmin=0, edgecolors="face", linewidth=0.1)
    axis.set(title="held-out, by matrix" if heldout else "calibration, by matrix", xlabel="block")
    axis.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
    step = max(1, len(blocks) // 12)
    axis.set_xticks([i + 0.5 for i in range(0, len(blocks), step)], [str(block) for block in blocks[::step]])
    axis.invert_yaxis()
    axis.grid(False)
    figure.colorbar(mesh, ax=axis, label="relative loss").outline.set_visible(False)


def _shown_loss(row: LayerRow, *, heldout: bool) -> float:
    """The same kind of loss on the whole map; NaN, a blank, for a matrix left dense or without the number."""
    loss = row.heldout_relative_loss if heldout else row.relative_loss
    return math.nan if loss is None or row.stays_dense else loss
