"""Combine the complete parts of a study into one run directory, with their comparison."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
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
BY_CORPUS = ("calibration_quality", "starved_experts")
"""Fields of a record that map a corpus to what its first draw gave."""


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
        samples = _first_of_each((_json(part / "samples.json") for part in complete), "corpus")
        write_whole(folder / "samples.json", json.dumps(samples, ensure_ascii=False, indent=1))
    write_whole(folder / "plan.yaml", dump_plan(plan))
    record = together([_json(part / "run.json") for part in complete])
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
    """Merge the records of several runs: sums of costs, each note, draw and corpus once, everything else from the first
    record."""
    draws = _first_of_each((record["calibration_draws"] for record in records), "corpus", "seed")
    merged: dict[str, Any] = {"stages": {}, "cache": {"hits": 0, "misses": 0}, "calibration_tokens_read": 0}
    merged |= {"notes": [], "failed": {}, "choices": [], **{name: {} for name in BY_CORPUS}}
    merged |= {"calibration_draws": draws, "calibration_tokens": sum(draw["tokens"] for draw in draws)}
    merged["sufficiency"] = _first_of_each((record.get("sufficiency", []) for record in records), "corpus")
    for record in records:
        for of in ("stages", "cache"):
            for name, amount in record[of].items():
                merged[of][name] = merged[of].get(name, 0) + amount
        for name in BY_CORPUS:
            merged[name] |= {corpus: found for corpus, found in record[name].items() if corpus not in merged[name]}
        merged["calibration_tokens_read"] += record["calibration_tokens_read"]
        merged["failed"] |= record["failed"]
        merged["notes"] += [note for note in record["notes"] if note not in merged["notes"]]
        merged["choices"] += record.get("choices", [])
        merged["peak_rss_bytes"] = max(record["peak_rss_bytes"], merged.get("peak_rss_bytes", 0))
    first = {name: value for name, value in (records[0] if records else {}).items() if name not in merged}
    return first | merged


def _write_together(folder: Path, parts: Sequence[Path], name: str, kind: type[Row], order: Mapping[str, int]) -> None:
    rows = _once(row for part in parts for row in rows_there(part / name, kind))
    write_rows(folder / name, sorted(rows, key=lambda row: order[row.variant]))


def _first_of_each(lists: Iterable[Sequence[dict[str, Any]]], *fields: str) -> list[dict[str, Any]]:
    """Return the entries of all lists, without those that an earlier list has by the values of `fields`."""
    found, of = [], itemgetter(*fields)
    for entries in lists:
        known = {of(entry) for entry in found}
        found += [entry for entry in entries if of(entry) not in known]
    return found


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _once(rows: Iterable[Row]) -> list[Row]:
    """Drop repeated rows, since every part measures the dense model."""
    found: dict[Any, Row] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name, None) for name in IDENTITY), row)
    return list(found.values())
