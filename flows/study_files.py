"""Combine the complete parts of a study into one run directory, with their comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crosscal.files import write_whole
from crosscal.flows.run_directory import write_run_record
from crosscal.flows.steps import Stopwatch, step
from crosscal.flows.study_parts import StudyPart
from crosscal.plan import CompressionPlan, Study, dump_plan
from crosscal.report.groups import DENSE
from crosscal.report.rows import DocumentRow, LayerRow, QuestionRow, ResultRow, WindowRow, write_rows
from crosscal.report.run_files import read_run, rows_there
from crosscal.report.study import study_rows
from crosscal.tasks.results import make_report
from crosscal.variants import variants

Row = TypeVar("Row", ResultRow, LayerRow, WindowRow, QuestionRow, DocumentRow)
IDENTITY = ("variant", "layer", "corpus_or_task", "corpus", "task", "split", "metric")
"""Fields that identify a row."""
SUMMED = ("calibration_tokens", "calibration_tokens_read")


def write_up(folder: Path, plan: CompressionPlan, parts: Sequence[StudyPart], watch: Stopwatch) -> dict[str, Any]:
    """Write all complete parts as one run's files, with `study.jsonl` and the report; return the record."""
    complete = [part.folder for part in parts if part.is_complete]
    order = {name: number for number, name in enumerate([DENSE, *(variant.name for variant in variants(plan))])}
    _write_together(folder, complete, "results.jsonl", ResultRow, order)
    _write_together(folder, complete, "windows.jsonl", WindowRow, order)
    _write_together(folder, complete, "questions.jsonl", QuestionRow, order)
    _write_together(folder, complete, "summaries.jsonl", DocumentRow, order)
    _write_together(folder, complete, "layers.jsonl", LayerRow, order)
    if complete:
        write_whole(folder / "samples.json", (complete[0] / "samples.json").read_text(encoding="utf-8"))
    write_whole(folder / "plan.yaml", dump_plan(plan))
    record = together([json.loads((part / "run.json").read_text(encoding="utf-8")) for part in complete])
    record |= {"run_dir": str(folder), "variants": len(order) - 1, "draws": len(plan.seeds)}
    record |= {"parts": {"complete": len(complete), "of": len(parts)}}
    for stage, seconds in watch.seconds.items():
        record["stages"][stage] = record["stages"].get(stage, 0.0) + seconds
    asked = plan.study or Study()  # pyright: ignore[reportCallIssue]
    (folder / "study.jsonl").unlink(missing_ok=True)  # `read_run` might not parse an earlier version's
    write_rows(folder / "study.jsonl", study_rows(read_run(folder), asked.baseline))
    write_run_record(folder, record)
    if complete:
        step(make_report, str(folder))
    return record


def together(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the records of several runs: sums of costs, each note once, everything else from the first record."""
    merged: dict[str, Any] = {"stages": {}, "cache": {"hits": 0, "misses": 0}, **dict.fromkeys(SUMMED, 0)}
    merged |= {"notes": [], "failed": {}, "calibration_quality": {}, "choices": []}
    for record in records:
        for of in ("stages", "cache"):
            for name, amount in record[of].items():
                merged[of][name] = merged[of].get(name, 0) + amount
        for name in SUMMED:
            merged[name] += record[name]
        for name in ("failed", "calibration_quality"):
            merged[name] |= record[name]
        merged["notes"] += [note for note in record["notes"] if note not in merged["notes"]]
        merged["choices"] += record.get("choices", [])
        merged["peak_rss_bytes"] = max(record["peak_rss_bytes"], merged.get("peak_rss_bytes", 0))
    first = {name: value for name, value in (records[0] if records else {}).items() if name not in merged}
    return first | merged


def _write_together(folder: Path, parts: Sequence[Path], name: str, kind: type[Row], order: Mapping[str, int]) -> None:
    rows = _once(row for part in parts for row in rows_there(part / name, kind))
    write_rows(folder / name, sorted(rows, key=lambda row: order[row.variant]))


def _once(rows: Iterable[Row]) -> list[Row]:
    """Drop repeated rows, since every part measures the dense model."""
    found: dict[Any, Row] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name, None) for name in IDENTITY), row)
    return list(found.values())
