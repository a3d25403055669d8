"""Environment of all tests: no network access to the hub, no telemetry, no Prefect server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from crosscal.store import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.pop("PREFECT_API_URL", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that no worker of a parallel run is left with a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def landing(tmp_path: Path) -> Path:
    """A landing folder with one domain, `legal`."""
    (tmp_path / "landing" / "legal").mkdir(parents=True)
    return tmp_path / "landing"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    from crosscal.store import Store

    return Store(tmp_path / "home")


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, for tests that do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
