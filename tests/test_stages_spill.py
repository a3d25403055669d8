"""Hidden states spill to disk if they need more than half of the free memory, but never to a disk they would fill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosscal.errors import ModelError
from crosscal.models import ModelSource
from crosscal.stages.spill import spill_folder
from tests.helpers.tiny_models import COMMON, save_model, windows

F32_BYTES = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource.open(save_model("llama", tmp_path_factory.mktemp("llama")))


def test_more_than_half_of_the_memory_goes_to_disk(source: ModelSource, tmp_path: Path) -> None:
    slices = [windows(3), windows(2, length=12)]
    needed_bytes = (3 * 24 + 2 * 12) * COMMON["hidden_size"] * F32_BYTES
    placed = [
        spill_folder(source, slices, dtype=torch.float32, device="cpu", free=free_bytes, folder=tmp_path)
        for free_bytes in (2 * needed_bytes, 2 * needed_bytes - 1)
    ]
    assert placed == [None, tmp_path]
    assert spill_folder(source, slices, dtype=torch.float32, device="cpu") is None


def test_a_disk_that_is_too_small_is_named(source: ModelSource, tmp_path: Path) -> None:
    absurd_SL = torch.zeros(1, 1, dtype=torch.long).expand(10**8, 10**8)
    with pytest.raises(ModelError, match="neither in memory nor on disk"):
        spill_folder(source, [absurd_SL], dtype=torch.float32, device="cpu", folder=tmp_path)
