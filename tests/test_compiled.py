"""Compiled loops work without a cache directory for their code."""

from __future__ import annotations

import numpy as np
import pytest
from numba.core import caching

from crosscal.compiled import compiled


def squares(values_N: np.ndarray) -> float:
    total = 0.0
    for value in values_N:
        total += value * value
    return total


def test_where_the_code_cannot_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        caching.FunctionCache(squares)
    assert compiled(squares)(np.arange(4.0)) == 14.0
