"""Share of a quantized model that is stored dense instead of packed, and the model's size on disk.

`bits: 4` in a row states that a matrix was rounded, not whether the file holds integers or their dequantized values;
the size of the model depends on the latter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from crosscal.report.numbers import percent_text
from crosscal.report.rows import LayerRow

MOST_REASONS = 4
MOST_VARIANTS = 8


def dense_text(layers: Sequence[LayerRow], dtype: str) -> str:
    """Return what stays dense of a variant's listed matrices and why, as a share of their parameters; empty if all are
    packed, and for variants without a rounded matrix."""
    if not any(row.bits is not None or row.mean_bits is not None for row in layers):
        return ""
    reasons: dict[str, int] = defaultdict(int)
    for row in layers:
        if row.bits is None or row.written_dense is not None:
            reasons[row.written_dense or row.fallback or "not rounded"] += row.parameters or 0
    return share_text(reasons, sum(row.parameters or 0 for row in layers), dtype)


def share_text(reasons: Mapping[str, int], of_parameters: int, dtype: str) -> str:
    """Format the share of parameters that are not packed. `reasons`: reason -> number of parameters."""
    if not (dense := sum(reasons.values())):
        return ""
    largest = sorted(reasons.items(), key=lambda item: -item[1])
    told = [f"{percent_text(number / of_parameters)}: {reason}" for reason, number in largest[:MOST_REASONS]]
    told += [f"and {len(largest) - MOST_REASONS} more reasons"] * (len(largest) > MOST_REASONS)
    return f"{percent_text(dense / of_parameters)} of the block weights stay in {dtype} ({'; '.join(told)})"


def dense_notes(texts: Mapping[str, str], sizes_bytes: Mapping[str, int]) -> list[str]:
    """Return one sentence for all variants with the same text. `texts`: variant -> result of `dense_text`."""
    alike: dict[str, list[str]] = defaultdict(list)
    for variant, text in texts.items():
        if text:
            size = f" ({sizes_bytes[variant] / 1e6:,.1f} MB on disk)" if variant in sizes_bytes else ""
            alike[text].append(variant + size)
    return [f"{_some(variants)}: {text}" for text, variants in alike.items()]


def _some(variants: Sequence[str]) -> str:
    more = len(variants) - MOST_VARIANTS
    return ", ".join(variants[:MOST_VARIANTS]) + (f" and {more} more" if more > 0 else "")
