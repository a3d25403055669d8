"""Check that the Prefect server answers, with a clear error before anything starts."""

from __future__ import annotations

import os

import httpx

from crosscal.errors import CrosscalError, UsageError


def probe(api_url: str) -> None:
    """Raise `UsageError` when no server answers at this URL."""
    try:
        httpx.get(f"{api_url.rstrip('/')}/health", timeout=5).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(
            "the Prefect server does not answer",
            where=api_url,
            got=str(error),
            do="Start it (`prefect server start`), or unset PREFECT_API_URL to run without one.",
        ) from error


def check_access(api_url: str) -> None:
    """Raise `CrosscalError` when the server denies access, or answers with an error."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            client.read_work_pools(limit=1)
    except PrefectHTTPStatusError as error:
        refused = error.response.status_code in (401, 403)
        raise CrosscalError(
            "the Prefect server refuses us" if refused else "the Prefect server answers with an error",
            where=api_url,
            got=f"status {error.response.status_code}",
            do="Set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING." if refused else "",
        ) from error


def server_needed(for_what: str) -> str:
    """Return the server's URL, once it has answered and granted access.

    Raises `UsageError` when PREFECT_API_URL is not set, `CrosscalError` when the server is down or denies access.
    """
    api_url = os.environ.get("PREFECT_API_URL")
    if not api_url:
        raise UsageError(
            f"{for_what} needs a Prefect server, and PREFECT_API_URL names none",
            do="Start one (`prefect server start`) and set PREFECT_API_URL=http://127.0.0.1:4200/api.",
        )
    try:
        probe(api_url)
    except UsageError as error:
        do = "Start it (`prefect server start`), or correct PREFECT_API_URL."
        raise CrosscalError(error.what, where=error.where, got=error.got, do=do) from error
    check_access(api_url)
    return api_url
