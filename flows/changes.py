"""Detect a changed plan or model and request a run of the domains whose last requested run used another one.

The check runs every minute, so it first compares only what is cheap: the bytes of the plan's file, and names, sizes
and times in the model's folder. If they differ, the plan's content and the digest of the model's files decide. The
ledger stores the digest under these names, sizes and times, so that only one machine reads the gigabytes, once.
A plan is identified by its file name and overrides, so a manual run with another plan does not count as a change of
the service's plan. For a model named by a hub id, only the plan is compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crosscal.errors import CrosscalError
from crosscal.landing import Ledger
from crosscal.store import digest_of

SETTLE_SECONDS = 60.0
"""A model folder that changed more recently than this may still be being copied."""
Value = dict[str, Any]


def notice_changes(
    ledger: Ledger,
    plan: Path,
    overrides: tuple[str, ...] = (),
    domains: Iterable[str] | None = None,
    *,
    settle_seconds: float = 0.0,
) -> dict[str, str]:
    """Request a run of each domain (default: all) whose plan or model changed; return domain → what changed."""
    view, found = ledger.look(), {}
    by = " ".join((plan.name, *overrides))
    for domain in view.domains() if domains is None else domains:
        version, key = view.requested(domain), f"made/{domain}/{digest_of(by)[:16]}"
        before = view.items.get(key)
        if version is None or (before is not None and before["look"] == _look(plan, before["folder"])):
            continue
        written, folder = _written(plan, overrides, domain)
        if _is_on_its_way(folder, settle_seconds):
            continue
        look = _look(plan, folder)  # before the files are read: a change in between is noticed next time
        model = None if folder is None else _digest(ledger, Path(folder))
        now = {"by": by, "plan": written, "model": model, "folder": folder, "look": look}
        is_first = not any(kind == "made" for kind, _ in view.keys(domain))
        if changed := _difference(before, now, is_first):
            found[domain] = changed
            ledger.request(domain, version, anew=changed, seen={key: now})
        else:
            ledger.note(key, {**now, "model": model or (before and before["model"])})
    return found


def _difference(before: Value | None, now: Value, is_first: bool) -> str | None:
    """Return what changed. The first plan recorded for a domain (`is_first`) counts as unchanged."""
    if before is None:
        return None if is_first else "another plan"
    if before["plan"] != now["plan"]:
        return "the plan changed"
    return "the model changed" if before["model"] and now["model"] and before["model"] != now["model"] else None


def _written(plan: Path, overrides: tuple[str, ...], domain: str) -> tuple[str, str | None]:
    """Return the digest of a plan's content, independent of its location, and its model folder.

    For a plan that cannot be read, the digest of the error: it counts as changed, and its run reports the error.
    """
    from crosscal.plan import load_plan, read_plan

    try:
        content = json.loads(json.dumps(read_plan(plan, overrides), default=str))
        model = Path(load_plan(plan, overrides, domain).model).expanduser()
    except CrosscalError as error:
        return digest_of(str(error)), None
    return digest_of(content), str(model) if model.is_dir() else None


def _digest(ledger: Ledger, folder: Path) -> str | None:
    """Return the digest of a model's files; None if the folder holds no readable model."""
    key = f"model/{digest_of([str(folder), _stamps(folder)])[:16]}"
    known = ledger.look().items.get(key)
    if known is not None:
        return known["digest"]
    from crosscal.models.source import ModelSource

    try:
        digest = ModelSource.open(folder).digest
    except (CrosscalError, OSError):  # the run reports why
        return None
    ledger.note(key, {"digest": digest, "folder": str(folder)})
    return digest


def _look(plan: Path, folder: str | None) -> str:
    content = plan.read_bytes().hex() if plan.is_file() else None
    return digest_of([content, None if folder is None else _stamps(Path(folder))])


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _is_on_its_way(folder: str | None, settle_seconds: float) -> bool:
    newest = max((ns for *_, ns in _stamps(Path(folder))), default=0) if folder else 0
    return time.time() - newest / 1e9 < settle_seconds
