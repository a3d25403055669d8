"""What a report reads: the files of one run directory, whichever of them are there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosscal.errors import UsageError
from crosscal.report.groups import Group, groups_of
from crosscal.report.rows import LayerRow, QuestionRow, ResultRow, Row, StudyRow, WindowRow, read_rows


@dataclass(frozen=True)
class CalibrationText:
    """Some of what a model was calibrated on."""

    corpus: str
    text: str
    source: str
    """`documents`, `self` (the model wrote it) or `random`; empty in files that do not say."""


@dataclass(frozen=True)
class RunFiles:
    """The content of a run directory; only `results.jsonl` is required."""

    results: list[ResultRow]
    layers: list[LayerRow]
    windows: list[WindowRow]
    run: dict[str, Any]
    samples: list[CalibrationText]
    plan: str
    models: frozenset[str]
    """The variants whose models were kept."""
    questions: list[QuestionRow] = field(default_factory=list)
    study: list[StudyRow] = field(default_factory=list)
    """What a study concludes; empty for any other run."""

    @property
    def groups(self) -> list[Group]:
        return groups_of(self.results, self.layers, self.windows)


def read_run(folder: Path) -> RunFiles:
    """Read a run directory; `UsageError` when it holds no results or a damaged file."""
    if not (folder / "results.jsonl").is_file():
        raise UsageError("no results.jsonl here", where=str(folder), do="Give the directory that `crosscal run` wrote.")
    run = _json(folder / "run.json")
    run = {name: value for name, value in run.items() if value is not None} if isinstance(run, dict) else {}
    samples = _json(folder / "samples.json") or run.get("samples")
    plan = folder / "plan.yaml"
    return RunFiles(
        results=read_rows(folder / "results.jsonl", ResultRow),
        layers=rows_there(folder / "layers.jsonl", LayerRow),
        windows=rows_there(folder / "windows.jsonl", WindowRow),
        run=run,
        samples=[_sample(sample) for sample in samples] if isinstance(samples, list) else [],
        plan=plan.read_text(encoding="utf-8") if plan.is_file() else "",
        models=frozenset(path.parent.name for path in folder.glob("models/*/config.json")),
        questions=rows_there(folder / "questions.jsonl", QuestionRow),
        study=rows_there(folder / "study.jsonl", StudyRow),
    )


def rows_there(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file; none where it is not there."""
    return read_rows(path, kind) if path.is_file() else []


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError("not JSON", where=str(path), got=str(error)) from error


def _sample(sample: Any) -> CalibrationText:
    if isinstance(sample, dict):
        return CalibrationText(*(str(sample.get(name, "")) for name in ("corpus", "text", "source")))
    return CalibrationText("", str(sample), "")
