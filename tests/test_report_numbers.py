"""Laws of numbers as text: a value and its error have the same decimals and are rounded correctly."""

from __future__ import annotations

import math
import random

import pytest

from crosscal.report.numbers import Number, number_text, percent_text, plain_text, with_error


def decimals(text: str) -> int:
    return len(text.partition(".")[2])


@pytest.mark.parametrize("seed", range(300))
def test_a_value_and_its_error_have_the_same_decimals(seed: int) -> None:
    chance = random.Random(seed)
    value = 10 ** chance.uniform(-2, 5.9) * chance.choice((1, -1))
    error = abs(value) * 10 ** chance.uniform(-5, 0.5)
    shown, _, shown_error = with_error(value, error).partition(" ± ")
    if "e+" not in shown_error:  # an error may lift a value over the limit of plain notation
        assert decimals(shown) == decimals(shown_error)
        assert float(shown_error) == pytest.approx(error, rel=0.051)
        assert abs(float(shown) - value) <= 0.51 * 10.0 ** -decimals(shown)
        assert len(shown_error.replace(".", "").lstrip("0")) >= 2


def test_a_round_value_keeps_the_zeros_that_its_error_vouches_for() -> None:
    assert with_error(2.0, 0.018) == "2.000 ± 0.018"
    assert with_error(2.24, 0.021) == "2.240 ± 0.021"
    assert with_error(80.0, 0.0996) == "80.00 ± 0.10"
    assert with_error(104.0, 12.0) == "104 ± 12"
    assert with_error(12345.6, 234.0) == "12346 ± 234"
    assert with_error(2.24, 0.0) == "2.240 ± 0"
    assert number_text(Number(0.5, 0.25, 3), "acc") == "50 ± 25 % (n=3)"
    assert number_text(Number(1.0, 0.0, 1), "acc") == "100.0 ± 0 %"


def test_a_perplexity_of_a_broken_model_is_short_and_true() -> None:
    assert with_error(1.234e13, 2.5e12) == "(1.23 ± 0.25)e+13"
    assert plain_text(1.234e13) == "1.234e+13"


@pytest.mark.parametrize("seed", range(100))
def test_a_value_alone_has_four_digits(seed: int) -> None:
    value = 10 ** random.Random(seed).uniform(-3, 12)
    text = plain_text(value)
    assert float(text) == pytest.approx(value, rel=5.1e-4)
    digits = text.partition("e")[0].replace(".", "").lstrip("0")
    assert len(digits) == max(4, math.floor(math.log10(float(text))) + 1 if "e" not in text else 4)


def test_0_and_100_percent_are_shown_only_if_exact() -> None:
    assert [percent_text(share) for share in (0, 1e-7, 0.0714, 0.9999, 1)] == [
        "0 %", "< 0.001 %", "7.14 %", "> 99.9 %", "100 %",
    ]  # fmt: skip
