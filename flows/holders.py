"""Asking the server whether the holder of a claim is over: for holders on other machines, which cannot be seen."""

from __future__ import annotations

from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from crosscal.landing import Run


def has_ended(run: Run) -> bool | None:
    """What the server says; None where there is no server, or the run was carried out without it."""
    if not PREFECT_API_URL.value():
        return None
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run.run_id)).state
    except (ValueError, ObjectNotFound, httpx.HTTPError):
        return None
    return state.is_final() if state else None
