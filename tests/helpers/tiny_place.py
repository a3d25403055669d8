"""A tiny model, two tiny corpora and a plan in one folder, and the command line run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from crosscal.cli import main
from tests.helpers.tiny_text import SENTENCES, tiny_llama

DOCUMENTS = {"train": 60, "validation": 20, "test": 20}


@dataclass(frozen=True)
class Place:
    """A folder with `model/`, `general/`, `legal/` and `plan.yaml`; the store is `home/`, the run directory `run/`."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.yaml"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def write_plan(self, **changes: Any) -> Path:
        content = {
            "model": "model",
            "corpora": {"general": "general", "legal": "legal"},
            "calibration": {"windows": 8, "length": 32, "held_out_windows": 4},
            "compress": [{"method": "sparsegpt", "sparsity": 0.5, "domain": "legal", "alpha": [0, 0.5]}],
            "evaluate": {"windows": 4},
            "execution": {"device": "cpu"},
        }
        self.plan.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return self.plan

    def run(self, *extra: str) -> dict[str, Any]:
        """Run `crosscal run plan.yaml --json`, assert that it succeeds, and return its record."""
        options = ("--home", str(self.home), "--json")
        out = () if "--out" in extra else ("--out", str(self.run_dir))
        done = crosscal("run", str(self.plan), *options, *out, *extra)
        assert done.code == 0, done.err
        return json.loads(done.out)


def make_place(folder: Path) -> Place:
    place = Place(folder)
    tiny_llama(folder / "model")
    write_corpus(folder / "general", seed=1)
    write_corpus(folder / "legal", seed=2)
    place.write_plan()
    return place


def write_corpus(folder: Path, *, seed: int) -> None:
    folder.mkdir(parents=True)
    for split, count in DOCUMENTS.items():
        write_documents(folder / f"{split}.jsonl", seed=f"{seed}-{split}", count=count)


def write_documents(file: Path, *, seed: str, count: int) -> None:
    """Write distinct documents of six random sentences."""
    chance = random.Random(seed)
    texts = (f"{seed} {number}: " + " ".join(chance.choices(SENTENCES, k=6)) for number in range(count))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def crosscal(*arguments: str) -> Outcome:
    """Run the command line in this process; return its exit code and output."""
    out, err, logger = io.StringIO(), io.StringIO(), logging.getLogger("crosscal")
    handlers, propagate = list(logger.handlers), logger.propagate
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with mock.patch.object(sys, "argv", ["crosscal", *arguments]):
                main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    return Outcome(code, out.getvalue(), err.getvalue())


def run_alone(place: Place, out: Path) -> None:
    """Target of a child process: exits with the exit code of `crosscal run`."""
    done = crosscal("run", str(place.plan), "--home", str(place.home), "--out", str(out))
    print(done.err, file=sys.stderr)
    sys.exit(done.code)


def values(results: Path) -> list[tuple[Any, ...]]:
    """Return the measured values of a run, without the durations."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    fields = ("variant", "corpus_or_task", "split", "metric", "value", "stderr", "tokens", "seed")
    return [tuple(row[name] for name in fields) for row in rows]


def check(place: Place, *extra: str, code: int = 0) -> dict:
    """Return what `crosscal plan check` finds."""
    done = crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json", *extra)
    assert done.code == code, done.err
    return json.loads(done.out)
