"""Black-box checks of tiny models of every transformers type with a causal language model, and multimodal wrappers.

    python benchmarks/families.py [--types llama gemma3 ...] [--sizes ordinary coinciding odd] [--table | --check]

Writes results/families.json, one row per type and size, and from it the table of docs/families.md; rows not asked for
are kept. `--table` only writes the table, `--check` tests whether it matches the results. The whole takes about
eight minutes on two cores. `family_checks.py` has the checks of one model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from family_checks import Findings, as_json, examine  # noqa: E402
from records import RESULTS, commit  # noqa: E402
from table_cells import markdown  # noqa: E402
from tiny_families import SIZES, save, types  # noqa: E402

RESULT, DOC = RESULTS / "families.json", ROOT / "docs" / "families.md"
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
SECONDS = 180
"""Time limit for one type in one size."""
STORED_IN = {"ordinary": torch.bfloat16}
"""Checkpoints of other sizes are stored in float32, which allows comparison to more digits."""


def one(family: str, size: str) -> Findings:
    with tempfile.TemporaryDirectory() as folder, _limit(SECONDS):
        path = Path(folder, "model")
        try:
            save(family, SIZES[size], path, STORED_IN.get(size, torch.float32))
        except Exception as error:
            return Findings(family, size, not_built=_said(error))
        try:
            return examine(family, size, path)
        except Exception as error:
            if frames := os.environ.get("FAMILIES_TRACE"):
                traceback.print_exc(limit=-int(frames))
            return Findings(family, size, failed=_said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def ended(*_: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    signal.signal(signal.SIGALRM, ended)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return totals and one line per type."""
    of_type: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_type.setdefault(row["family"], []).append(row)
    run = [mine for mine in of_type.values() if _runs(mine)]
    counts = {
        "run in every size that transformers builds": run,
        "of these with `leave_dense`": [mine for mine in run if mine[0]["leave_dense"]],
        "refused in the same words by plan check and run": [
            m for m in of_type.values() if _refusals(m) and not _faults(m)
        ],
        "not built by transformers": [mine for mine in of_type.values() if not _built(mine)],
        "with a fault": [mine for mine in of_type.values() if _faults(mine)],
    }
    totals = ", ".join(f"{len(found)} {what}" for what, found in counts.items())
    made = "; ".join(sorted({f"{row['date']}, commit {row['commit']}" for row in rows}))
    lines = [_line(family, mine) for family, mine in sorted(of_type.items())]
    heads = ("type", "supported", "solved", "left dense", "packed at 4 bits", "notes")
    return f"{len(of_type)} types, {len(rows)} models: {totals}.\n\n{markdown(heads, lines)}\n{made}.\n"


def _built(mine: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in mine if not row["not_built"]]


def _runs(mine: Sequence[dict[str, Any]]) -> bool:
    return bool(_built(mine)) and all(row["runs"] for row in _built(mine))


def _faults(mine: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(fault for row in mine for fault in row["faults"]))


def _refusals(mine: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["refused_by_check"] for row in mine if row["refused_by_check"]))


def _line(family: str, mine: Sequence[dict[str, Any]]) -> list[str]:
    runs, unbuilt = _runs(mine), [row for row in mine if row["not_built"]]
    notes = _faults(mine) or _refusals(mine)
    notes += [f"not built: {row['size']} ({row['not_built']})" for row in unbuilt[:1]]
    if mine[0]["copied"]:
        notes.append("copied: " + ", ".join(part.partition(" (")[0] for part in mine[0]["copied"]))
    if patterns := mine[0]["leave_dense"]:
        notes.append("leave_dense: " + ", ".join(f"`{pattern}`" for pattern in patterns[:4]))
        notes[-1] += f" and {len(patterns) - 4} more" if len(patterns) > 4 else ""
    supported = ("with leave_dense" if mine[0]["leave_dense"] else "yes") if runs else "no"
    solved = str(sum(row["solved"] for row in mine)) if runs else ""
    shares = [_span([row[name] for row in mine]) if runs else "" for name in ("dense_share", "packed_share")]
    return [family, supported, solved, *shares, "; ".join(notes).replace("|", "\\|")]


def _span(values: Sequence[float | None]) -> str:
    found = sorted({f"{value:.0%}" for value in values if value is not None}, key=lambda text: float(text[:-1]))
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""


def rendered(text: str, rows: Sequence[dict[str, Any]]) -> str:
    return TABLE.sub(lambda match: f"{match[1]}\n{table(rows)}\n{match[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", default=types())
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=RESULT, help="another file of results; then no table is written")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    rows = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else []
    if asked.check:
        text = DOC.read_text(encoding="utf-8")
        sys.exit("docs/families.md is behind results/families.json: --table" if rendered(text, rows) != text else 0)
    known = {(row["family"], row["size"]): row for row in rows}
    for family in [] if asked.table else asked.types:
        for size in asked.sizes:
            known[family, size] = _measured(family, size)
            print(_shown(known[family, size]), flush=True)
            lines = ",\n".join(json.dumps(row) for row in known.values())
            asked.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if asked.out == RESULT:
        DOC.write_text(rendered(DOC.read_text(encoding="utf-8"), list(known.values())), encoding="utf-8")


def _measured(family: str, size: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return as_json(one(family, size)) | {"date": datetime.date.today().isoformat(), "commit": commit()}


def _shown(row: dict[str, Any]) -> str:
    state = "failed" if row["failed"] else "not built" if row["not_built"] else "runs" if row["runs"] else "refused"
    share = "" if row["packed_share"] is None else f" packed {row['packed_share']:.0%}"
    said = "; ".join(row["faults"]) or row["refused_by_check"] or row["not_built"] or ""
    return f"{'FAULT' if row['faults'] else 'ok':5} {state:9} {row['family']} {row['size']}{share} {said}"[:400]


if __name__ == "__main__":
    main()
