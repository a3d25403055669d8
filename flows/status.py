"""Check the health of the service that a file describes: server, workers and watch, domains, store and disks.

Nothing is changed. If the server or the store cannot be reached, one check reports that, and nothing is guessed about
the rest.
"""

from __future__ import annotations

from crosscal.errors import CrosscalError
from crosscal.flows.check import FAIL, Check
from crosscal.flows.health import server_needed
from crosscal.flows.server_checks import server_checks
from crosscal.flows.store_checks import store_checks
from crosscal.service import ServiceConfig


def status(service: ServiceConfig) -> list[Check]:
    """Return every check, in the order in which a user would make them."""
    return [*_of_server(service), *store_checks(service)]


def _of_server(service: ServiceConfig) -> list[Check]:
    try:
        url = server_needed("`crosscal status`")
    except CrosscalError as error:
        where = f" at {error.where}" if error.where else ""
        got = f": {error.got}" if error.got else ""
        return [Check("server", FAIL, f"{error.what}{where}{got}", error.do)]
    return list(server_checks(service, url))
