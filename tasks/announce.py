"""Prefect events. They only trigger a check and may be lost: whatever matters is in the ledger beforehand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import httpx
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL

LANDED, PUBLISHED, KEPT = "crosscal.corpus.landed", "crosscal.model.published", "crosscal.model.kept"
FILE_REFUSED, GIVEN_UP = "crosscal.file.refused", "crosscal.domain.given-up"
PROBE_SECONDS = 5
_log = logging.getLogger("crosscal")


def announce(domain: str, version: int) -> bool:
    """Announce that a version of a domain's corpus waits for a recompression; False, and logged, without a server."""
    return emit(LANDED, f"crosscal.corpus.{domain}", {"domain": domain, "version": version})


def emit(event: str, resource: str, payload: dict[str, Any]) -> bool:
    """Emit an event and wait until it is sent. Without a server that answers, return False and emit nothing."""
    return emit_each(event, [(resource, payload)])


def emit_each(event: str, told: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """As `emit`, for several resources, each with its payload."""
    if not told:
        return True
    url, first = PREFECT_API_URL.value(), told[0][0]
    if not url:
        _log.info("%s is not announced: no Prefect server is named by PREFECT_API_URL", first)
        return False
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=PROBE_SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        _log.warning("%s is not announced: %s does not answer (%s); the next watch makes up for it", first, url, error)
        return False
    for resource, payload in told:
        emit_event(event, resource={"prefect.resource.id": resource}, payload=payload)
    EventsWorker.instance().drain()
    return True
