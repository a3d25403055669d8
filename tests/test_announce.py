"""Without a Prefect server that answers, announcing sends nothing, logs the reason and returns at once."""

from __future__ import annotations

import logging
import socket
import time

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from crosscal.tasks.announce import announce


def test_without_a_server_nothing_is_sent_and_it_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("crosscal"), "propagate", True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    started = time.monotonic()
    for url, reason in ((None, "no Prefect server is named"), (dead, "does not answer")):
        caplog.clear()
        with temporary_settings({PREFECT_API_URL: url}), caplog.at_level(logging.INFO, "crosscal"):
            assert not announce("legal", 3)
        assert reason in caplog.text
    assert time.monotonic() - started < 5
