"""Command `select`: choose documents from a pool and write them to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from crosscal.cli.options import HOME, Home, Json


def select(
    pool: Annotated[list[str], typer.Argument(help="Files, folders, globs or hub dataset ids to choose from.")],
    out: Annotated[Path, typer.Option(help="The file to write, .jsonl.")],
    documents: Annotated[
        int | None, typer.Option(min=1, help="Number of documents; by default all distinct ones.")
    ] = None,
    towards: Annotated[str | None, typer.Option(help="A sample of what is wanted: file, folder, glob, hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="dsir or zip-fit; without --towards neither.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the selection.")] = 0,
    near_duplicates: Annotated[
        float,
        typer.Option(min=0, max=1, help="Jaccard similarity from which on two count as one; 0: if equal."),
    ] = 0.8,
    targets: Annotated[int, typer.Option(min=1, help="Documents of the sample that zip-fit compares with.")] = 64,
    least_words: Annotated[int, typer.Option(min=1, help="dsir does not choose shorter documents.")] = 100,
    text: Annotated[str, typer.Option(help="Column that holds the text, of pool and sample.")] = "text",
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Choose training documents similar to a sample, without near-duplicates, and write them with their scores.

    Validation and test documents of pool and sample, and near-duplicates of them, are not chosen. A source whose files
    name no splits reserves 5 % of its documents for each of the two.
    """
    from crosscal.cli.printing import print_value
    from crosscal.plan.sources import select_of
    from crosscal.progress import reporting
    from crosscal.selection import SelectionSettings
    from crosscal.selection.export import choose_to_file
    from crosscal.store import Store

    given: dict[str, Any] = {"method": method, "towards": towards, "documents": documents, "seed": seed}
    given |= {"near_duplicates": near_duplicates or None, "targets": targets, "least_words": least_words}
    asked = select_of(given)
    settings = SelectionSettings(**asked.model_dump(exclude={"towards"}))
    with reporting() as report:
        found = choose_to_file(Store(home), pool, asked.towards, settings, out, text=text, report=report)
    print_value(found, as_json)
