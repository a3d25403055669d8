"""Numbers as text: a value has the decimals of its error, or four digits if it has none."""

from __future__ import annotations

import math
from dataclasses import dataclass

DIGITS = 4
"""Significant digits of a value without an error."""
ERROR_DIGITS = 2
LARGE = 1e6
"""From here on, the power of ten is written separately."""
ROUNDOFF = 1e-12
"""Errors below this fraction of their value are roundoff from the order of a sum."""


@dataclass(frozen=True)
class Number:
    """A mean and its uncertainty: the deviation over seeds if there are several, else the standard error."""

    value: float
    error: float | None
    seeds: int


def number_text(number: Number | None, metric: str) -> str:
    """Format as "86.4 ± 2.6", in percent for accuracies, with n if there are several seeds."""
    if number is None:
        return "–"
    scale, unit = (100.0, " %") if is_fraction(metric) else (1.0, "")
    if number.error is None:
        text = short_text(number, metric)
    else:
        text = with_error(scale * number.value, scale * number.error)
    return text + unit + (f" (n={number.seeds})" if number.seeds > 1 else "")


def short_text(number: Number | None, metric: str) -> str:
    """Format the value alone, in percent (without the sign) for accuracies."""
    if number is None:
        return "–"
    return f"{100 * number.value:.1f}" if is_fraction(metric) else plain_text(number.value)


def with_error(value: float, error: float) -> str:
    """Format both to the same decimal place, the error's second digit: "2.000 ± 0.018", "104 ± 12"."""
    power = _exponent(max(abs(value), error), ERROR_DIGITS)
    if 10.0**power >= LARGE:
        return f"({with_error(value / 10.0**power, error / 10.0**power)})e+{power}"
    if error <= ROUNDOFF * abs(value):
        text = plain_text(value)
        return f"{text} ± 0"
    decimals = max(0, ERROR_DIGITS - 1 - _exponent(error, ERROR_DIGITS))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def plain_text(value: float, digits: int = DIGITS) -> str:
    """Format with `digits` significant digits, trailing zeros kept: "2.240", "104.2", "12346", "1.235e+07"."""
    power = _exponent(value, digits)
    if value == 0 or -DIGITS <= power < math.log10(LARGE):
        return f"{value:.{max(0, digits - 1 - power)}f}"
    return f"{value:.{digits - 1}e}"


def percent_text(fraction: float) -> str:
    """Format as "7.14 %"; 0 % and 100 % are exact, never rounded."""
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    return f"{100 * fraction:.3g} %" if fraction == 0 or fraction >= 1e-5 else "< 0.001 %"


def is_fraction(metric: str) -> bool:
    """Return whether a metric is an accuracy, which is shown in percent."""
    return metric.startswith("acc")


def _exponent(value: float, digits: int) -> int:
    """The power of ten of the first digit, after rounding to `digits`; 0 for 0."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])
