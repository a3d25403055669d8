"""What a user sees of long work: progress, the remaining time, and that it is still running."""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from pathlib import Path
from threading import Event

import pytest
import torch

from crosscal import progress
from crosscal.corpora import ingest, load_corpus
from crosscal.models import ModelSource
from crosscal.progress import Pace, logged
from crosscal.stages.evaluate import evaluation_set, measure
from crosscal.stages.heldout_text import WindowCutting
from crosscal.store import Store
from tests.helpers.tiny_place import write_corpus
from tests.helpers.tiny_text import tiny_llama


@pytest.mark.parametrize(
    ("done", "total", "gone", "left"), [(1, 4, 40, "2 min"), (3, 4, 30, "10 s"), (10, 100, 1200, "3 h")]
)
def test_the_time_left_is_what_the_rest_takes_at_the_speed_so_far(
    monkeypatch: pytest.MonkeyPatch, done: int, total: int, gone: float, left: str
) -> None:
    pace, now = Pace(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert pace.words() == ""
    pace.report("windows", 0, total)
    assert pace.words() == f"windows: 0 of {total}"
    now[0] += gone
    pace.report("windows", done, total)
    assert pace.words() == f"windows: {done} of {total}, about {left} left"
    pace.report("windows", total, total)
    assert pace.words() == f"windows: {total} of {total}"


def test_what_is_new_is_logged_now_and_then_and_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.02)
    monkeypatch.setattr(progress, "REMIND_EVERY_SECONDS", 0.2)
    lines: list[str] = []

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 20
        while len(lines) < count and time.monotonic() < deadline:
            time.sleep(0.005)

    with logged(lines.append) as report:
        time.sleep(0.1)
        assert lines == [], "nothing is said before there is anything to say"
        report("hashing 16.1 GB", 0, None)
        wait_for(1)
        assert lines == ["hashing 16.1 GB"]
        wait_for(2)
        assert lines[1].startswith("hashing 16.1 GB (still at work, ")
        report("reading", 3, 32)
        wait_for(3)
        assert lines[2] == "reading: 3 of 32"
    said = len(lines)
    time.sleep(0.1)
    assert len(lines) == said, "nothing is said after the end"


def test_lines_are_logged_in_the_context_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's log handler reads its server's address there: a Dask worker must not start a server of its own."""
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.02)
    address, found, is_logged = ContextVar("address", default="none"), [], Event()

    def log(words: str) -> None:
        found.append(address.get())
        is_logged.set()

    token = address.set("the run's server")
    with logged(log) as report:
        report("reading", 0, None)
        assert is_logged.wait(20)
    address.reset(token)
    assert set(found) == {"the run's server"}


def test_an_evaluation_tells_every_window_and_every_question(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    write_corpus(tmp_path / "general", seed=1)
    questions = tmp_path / "facts.jsonl"
    questions.write_text('{"question": "A river runs to the", "choices": ["sea", "moon"], "answer": 0}\n' * 6)
    store, source = Store(tmp_path / "home"), ModelSource.open(tmp_path / "model")
    ingest(store, "general", [str(tmp_path / "general")])
    told: list[tuple[str, int, int | None]] = []
    eval_set = evaluation_set(
        store, [load_corpus(store, "general")], source, WindowCutting(32, {"test": 4, "validation": 2}),
        tasks=[str(questions)], limit=None, batch_tokens=32, device="cpu", dtype=torch.float32,
        report=lambda *now: told.append(now),
    )  # fmt: skip
    measure(eval_set, source.path, name="dense", report=lambda *now: told.append(now))
    assert [now[1:] for now in told if now[0] == "dense: windows of general"] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [now[1:] for now in told if now[0] == "dense: windows of general (validation)"] == [(1, 2), (2, 2)]
    answers = [now for now in told if now[0] == "dense: questions of facts"]
    assert answers[-1][1:] == (6, 6)
    assert [now[1] for now in answers] == sorted(now[1] for now in answers)
    order = [re.sub(r" of .*", "", now[0]) for now in told]
    assert list(dict.fromkeys(order)) == [
        "general: reading test documents", "general: reading validation documents", "dense: bytes hashed",
        "dense: loading", "dense: windows", "dense: questions",
    ]  # fmt: skip
