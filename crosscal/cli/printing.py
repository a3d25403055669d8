"""Output of commands: readable lines, or JSON for machines."""

from __future__ import annotations

import json
import re
from typing import Any


def print_value(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(value))
        return
    for name, entry in value.items():
        if isinstance(entry, list):
            print(f"{name}: {len(entry) or 'none'}")
            for item in entry:
                print(f"  {_readable(item)}")
        else:
            print(f"{name}: {_readable(entry) if isinstance(entry, dict) else _amount(name, entry)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name}={_amount(name, entry)}" for name, entry in value.items())
    return str(value)


def _amount(name: str, value: Any) -> str:
    """Format a value; integers named `bytes` or `…_bytes` are sizes. A counted reason may end in the word, too."""
    is_amount = re.fullmatch(r"(\w+_)?bytes", name) and isinstance(value, int)
    return f"{value / 1e6:,.1f}MB" if is_amount else str(value)


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(_readable(row))
    if not rows:
        print("nothing")
