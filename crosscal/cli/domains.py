"""Commands for the domains of a landing place: list, pause, resume, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from crosscal.cli.options import HOME, Home, Json, store_at
from crosscal.cli.printing import print_rows, print_value
from crosscal.errors import UsageError

if TYPE_CHECKING:
    from crosscal.landing import Ledger

app = typer.Typer(help="The domains that landed: list, pause, resume, remove.", no_args_is_help=True)
Domain = Annotated[str, typer.Argument(help="A domain that landed.")]


@app.command("list")
def list_domains(home: Home = HOME, as_json: Json = False) -> None:
    """Show each domain: its newest version and state, its last run, its published variant."""
    from crosscal.landing import Ledger
    from crosscal.landing.status import overview
    from crosscal.publication import Published

    store = store_at(home)
    published = Published(store)
    rows = overview(Ledger(store))
    for row in rows:
        current = published.current(row["domain"])
        row["published"] = None if current is None else current.facts.get("variant")
    print_rows(rows, as_json)


@app.command("pause")
def pause(domain: Domain, home: Home = HOME) -> None:
    """Start no more runs of a domain. Its files are still ingested, and its pending version stays pending; a run in
    progress is not stopped."""
    _set_paused(home, domain, is_paused=True)


@app.command("resume")
def resume(domain: Domain, home: Home = HOME) -> None:
    """Start runs of a paused domain again: the next watch announces its pending version."""
    _set_paused(home, domain, is_paused=False)


@app.command("remove")
def remove(
    domain: Domain,
    file: Annotated[str | None, typer.Option(help="Only the documents that this landed file brought.")] = None,
    document: Annotated[
        list[str] | None, typer.Option(help="Only this document, by its SHA-256 or the beginning of it.")
    ] = None,
    containing: Annotated[str | None, typer.Option(help="Only documents that contain this text.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it only say what would be removed.")] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Remove a domain from the ledger and forget its published models; or remove documents from it.

    Removing documents makes a new version without them, which is pending like any other. Later landings do not bring
    them back; `crosscal ingest PATH --corpus NAME` does.
    """
    from crosscal.flows.removing import removal_of_documents, removal_of_domain

    filters = {"--file": file, "--document": document or None, "--containing": containing}
    asked = [name for name, given in filters.items() if given is not None]
    if len(asked) > 1:
        raise UsageError("give one of --file, --document and --containing")
    ledger = _ledger(home, domain)
    if asked:
        removal = removal_of_documents(ledger, domain, file=file, documents=document or [], containing=containing)
    else:
        removal = removal_of_domain(ledger, domain)
    done = removal.carry_out() if yes else {}
    print_value({**removal.shown, **done}, as_json)
    if not yes:
        raise UsageError("dry run: nothing was removed", where=domain, do="Give --yes to remove it.")


def _set_paused(home: str, domain: str, *, is_paused: bool) -> None:
    changed = _ledger(home, domain).pause(domain, is_paused=is_paused)
    print(f"{domain} {'is' if changed else 'was'} {'paused' if is_paused else 'resumed' if changed else 'not paused'}")


def _ledger(home: str, domain: str) -> Ledger:
    """Return the ledger. Raises `UsageError` for a domain that it does not contain."""
    from crosscal.landing import Ledger
    from crosscal.landing.status import check_known

    ledger = Ledger(store_at(home))
    check_known(ledger, domain)
    return ledger
