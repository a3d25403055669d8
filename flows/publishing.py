"""Publish a model manually: one that a run made but did not publish, or one that was published before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crosscal.errors import ModelError, StoreError, UsageError, nearest
from crosscal.landing.records import now
from crosscal.publication import Pointer, Published, publish_model
from crosscal.publication.models import check_model
from crosscal.report.rows import ResultRow, read_rows
from crosscal.stages.made_variants import folder_files
from crosscal.store import Store, digest_file
from crosscal.tasks.publication import reported


def go_back(store: Store, domain: str, number: int | None) -> Pointer:
    """Publish the model of an earlier move again (default: the move before the current one).

    Its files are verified before the pointer moves. Raises `UsageError` and `StoreError`.
    """
    published = Published(store)
    target = published.before(domain) if number is None else published.earlier(domain, number)
    try:
        check_model(store, target.model)
    except StoreError as error:
        do = "The pointer has not moved; choose another move."
        raise StoreError(
            "this model cannot be published again", where=f"{domain}, move {target.number}", got=str(error), do=do
        ) from error
    return published.restore(target, now())


def publish_by_hand(store: Store, domain: str, run_dir: Path, variant: str) -> Pointer:
    """Publish a model of a run of the domain, regardless of the decision. Raises `UsageError`, `ModelError`."""
    record = _record(run_dir)
    corpus = record["corpora"].get(domain)
    if corpus is None:
        of = ", ".join(record["corpora"])
        raise UsageError("this run is not one of the domain", where=str(run_dir), got=domain, do=f"It has: {of}.")
    folder = run_dir / "models" / variant
    if not (folder / "config.json").is_file():
        there = [path.parent.name for path in run_dir.glob("models/*/config.json")]
        raise UsageError(
            "no model of this name in the run", where=str(run_dir), got=variant, do=nearest(variant, there)
        )
    _check_files(store, folder, variant)
    published = Published(store)
    current = published.current(domain)
    version = corpus["landed"]
    key = publish_model(store, folder, {"domain": domain, "variant": variant, "corpus_version": version})
    if current is not None and current.model == key:
        raise UsageError("this is the model that is published", where=domain, got=f"move {current.number}")
    rows = [row for row in read_rows(run_dir / "results.jsonl", ResultRow) if row.variant == variant]
    facts = {
        "model": key,
        "variant": variant,
        "corpus_version": version,
        "run_dir": str(run_dir.absolute()),
        "perplexity": {"candidate": reported(rows), "published": None},
        "reason": "published by hand",
        "at": now(),
    }
    return published.move(domain, current, facts)


def _record(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "this is not the directory of a finished run"
        raise UsageError(what, where=str(run_dir), got=str(error), do="Give the folder that has run.json.") from error


def _check_files(store: Store, folder: Path, variant: str) -> None:
    """Compare a model's files with the digests recorded when it was made, if the store has them."""
    for name, digest in folder_files(store, folder, variant).items():
        if not (folder / name).is_file() or digest_file(folder / name) != digest:
            raise ModelError(
                "a file of the model is not what the run wrote",
                where=str(folder / name),
                do="Carry the run out again: it makes anew what is missing or changed.",
            )
