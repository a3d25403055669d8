"""Common to all charts of the report: style, colours, and SVG text that is the same for the same numbers."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

INK = "#0a0b0c"
"""Placeholder for the page's own text colour, so that a chart is readable on a light and on a dark page."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a6fdf", "#7f7f7f")
"""Okabe and Ito's palette for all kinds of colour vision, its yellow and black replaced."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2,
    "text.parse_math": False,  # names may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: small, selectable, searchable
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Apply the report's style while a chart is made, and restore matplotlib's settings afterwards. One thread at a
    time, because these settings and warning filters are process-wide."""
    from matplotlib import rc_context

    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": f"crosscal {name}"}
    with _ONE_AT_A_TIME, rc_context(style), warnings.catch_warnings():
        # Layout uses DejaVu's metrics; the browser's fonts have the glyphs that DejaVu lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def panels(count: int, *, columns: int, width: float = 10.5, height: float = 3.3) -> tuple[Any, list[Any]]:
    """Return a figure of `count` equal panels, left to right and then down; `height` inches for each row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08))
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(rows, columns, position + 1) for position in range(count)]
    for axis in axes:
        axis.patch.set_alpha(0)
    return figure, axes


def legend_below(figure: Any, handles: Sequence[Any], columns: int = 5) -> None:
    """Add one legend for all panels."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def svg_of(figure: Any) -> str:
    """Return the figure as an <svg> element without date, program name or prologue: equal numbers give equal bytes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    # Not `savefig`, which computes the layout one more time: the same bytes in four fifths of the time.
    FigureCanvasSVG(figure).print_svg(stream, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def plain_log_scale(*axes: Any) -> None:
    """Set a logarithmic scale with a few round numbers on it, written out."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    for axis in axes:
        axis._set_axes_scale("log")
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(ScalarFormatter())
