"""No test reaches the network, and none of the libraries reports to its makers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.pop("PREFECT_API_URL", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of two processes, none is left with a long file when the other has done all else."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def landing(tmp_path: Path) -> Path:
    """A landing place with the folder of one domain."""
    (tmp_path / "landing" / "legal").mkdir(parents=True)
    return tmp_path / "landing"
