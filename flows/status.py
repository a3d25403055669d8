"""Whether the service that a file describes is well: its server, workers and watch, its domains, its store and disks.

Only looked at, and nothing is changed. What cannot be known, because the server or the store is not there, is not
guessed: that one check says so.
"""

from __future__ import annotations

from crosscal.errors import CrosscalError
from crosscal.flows.check import FAIL, Check
from crosscal.flows.health import server_needed
from crosscal.flows.server_checks import server_checks
from crosscal.flows.store_checks import store_checks
from crosscal.service import ServiceConfig


def status(service: ServiceConfig) -> list[Check]:
    """Every check, in the order in which a person would make them."""
    return [*_of_server(service), *store_checks(service)]


def _of_server(service: ServiceConfig) -> list[Check]:
    try:
        url = server_needed("`crosscal status`")
    except CrosscalError as error:
        where = f" at {error.where}" if error.where else ""
        got = f": {error.got}" if error.got else ""
        return [Check("server", FAIL, f"{error.what}{where}{got}", error.do)]
    return list(server_checks(service, url))
