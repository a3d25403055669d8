"""Command `methods`: the compression methods that a plan may use."""

from __future__ import annotations

import json
from typing import Any

from crosscal.cli.options import Json


def methods(as_json: Json = False) -> None:
    """List the compression methods: what each does, the statistics it needs, its settings and its source."""
    from crosscal.plan.settings import described_methods

    found = described_methods()
    print(json.dumps(found)) if as_json else _show(found)


def _show(found: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for method in found:
        needs = ", ".join(method["needs"]) or "no data"
        source = f"  arXiv {', '.join(method['source'])}" if method["source"] else ""
        console.print(f"[bold]{method['method']}[/bold]  {method['kind']}, needs {needs}{source}")
        console.print(f"    {method['does']}", markup=False)
        settings = [f"{name}: {_value(field)}" for name, field in method["settings"].items()]
        console.print(f"    settings: {', '.join(settings) or 'none'}", markup=False)


def _value(field: dict[str, Any]) -> str:
    return field["type"] if field["needed"] else json.dumps(field["default"])
