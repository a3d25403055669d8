"""Deploy a service file to a Prefect server, or only report how they differ.

What matches is left alone. Everything else is created or updated with Prefect's own client and then compared again, to
verify that the server accepted all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client

from crosscal.errors import CrosscalError, PlanError
from crosscal.flows import deployments, notifications
from crosscal.flows.deployed import DeployedObject, FieldDifference, Things, deployed, differences
from crosscal.flows.health import server_needed
from crosscal.flows.workers import worker_commands
from crosscal.plan import load_plan
from crosscal.resources import ROOT
from crosscal.service import ServiceConfig
from crosscal.variants import variants

SOME_DOMAIN = "some-domain"


def check_plans(service: ServiceConfig) -> None:
    """Check that the service's plans exist and are valid. Raises `PlanError`, as `crosscal plan check` does."""
    for field, plan, domain in (("plan", service.plan, SOME_DOMAIN), ("sweep.plan", service.sweep.plan, None)):
        if not (ROOT / plan).is_file():  # an absolute path if the plan is beside the service file
            raise PlanError("no such plan, neither beside the service file nor in the checkout", where=field, got=plan)
        variants(load_plan(ROOT / plan, domain=domain))


def compare(service: ServiceConfig) -> list[FieldDifference]:
    """Return how the server differs from the service file, without changing anything."""
    want = _wanted(service)
    with get_client(sync_client=True) as client:
        return list(differences(_standing(client), want))


def deploy(service: ServiceConfig) -> dict[str, Any]:
    """Create or update what differs; return what was made, changed, removed and left alone, and worker commands.

    Raises `PlanError` for the service's plans, `UsageError` for a missing server, secret or notification block, and
    `CrosscalError` when the server is down or did not accept everything.
    """
    want = _wanted(service)
    if "://" not in service.landing:
        Path(service.landing).mkdir(parents=True, exist_ok=True)  # a watch without this folder fails
    names = {thing.name for thing in want}
    with get_client(sync_client=True) as client:
        before = _standing(client)
        found = list(differences(before, want))
        touched = {each.thing for each in found if each.thing in names}
        for thing in want:
            if thing.name in touched:
                thing.put(client)
        removed = [name for name in before if name not in names and name.startswith(notifications.MADE)]
        for name in removed:
            notifications.remove(client, name)
        left = [each for each in differences(_standing(client), want) if each.thing in names]
    if left:
        raise CrosscalError(
            "the server did not take all of it",
            where=left[0].thing,
            got=f"{left[0].field} {left[0].deployed!r} instead of {left[0].wanted!r}",
            do="Look at the thing in the Prefect UI, remove it there, and deploy again.",
        )
    return {
        "made": sorted(touched - before.keys()),
        "changed": [each.as_json() for each in found if each.thing in touched & before.keys()],
        "unchanged": sorted(names - touched),
        "removed": sorted(removed),
        "left alone": sorted(before.keys() - names - set(removed)),
        "workers": worker_commands(service),
    }


def _wanted(service: ServiceConfig) -> list[DeployedObject]:
    check_plans(service)
    server_needed("`crosscal deploy`")
    return [*deployments.wanted(service), *notifications.wanted(service)]


def _standing(client: SyncPrefectClient) -> Things:
    return deployed(client) | notifications.standing(client)
