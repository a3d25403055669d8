"""Generate the tables of benchmarks/README.md, between their marks, from results/*.json.

    python benchmarks/table.py [--check]

A table is between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file of `results/`, or one of the views below.
The prose around the tables is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import tables_of_mixtures as mixtures
import tables_of_solvers as solving
import tables_of_text as text_of
from table_cells import plain

README = Path(__file__).parent / "README.md"
MARK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
VIEWS: dict[str, Callable[[], str]] = {
    "testbed-grid": mixtures.grid,
    "testbed-draws": mixtures.draws,
    "study": mixtures.study,
    "chats": mixtures.chats,
    "alpha": mixtures.alpha,
    "tasks": mixtures.tasks,
    "peers": solving.peers,
    "solvers": solving.solvers,
    "solvers_one_draw": lambda: solving.solvers("solvers_one_draw"),
    "solvers_low_rank": lambda: solving.solvers("solvers_low_rank"),
    "real-models": solving.real_models,
    "allocation": solving.allocation,
    "gradients": solving.gradients,
    "scales": solving.scales,
    "choosing": text_of.choosing,
    "leaks": text_of.leaks,
    "text-quality": text_of.text_quality,
    "verdicts": text_of.verdicts,
}


def rendered(text: str) -> str:
    """Return the text with every table generated again."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{match[1]}\n{VIEWS[name]() if name in VIEWS else plain(name)}\n{match[3]}"

    return MARK.sub(table, text)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit("benchmarks/README.md is behind results/: make table" if rendered(text) != text else 0)
    README.write_text(rendered(text), encoding="utf-8")


if __name__ == "__main__":
    main()
