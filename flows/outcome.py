"""The outcome of a flow run in the Prefect UI: the message of its final state, and for some runs name and tags.

Nothing heavy is imported here: the watch starts every minute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Completed, Failed

from crosscal.errors import CrosscalError

MOST_LETTERS = 120
MOST_TAGS = 12
NEWS = "news"
"""Tag of a run that did something. The UI can filter by a tag, but not by its absence."""


def call_run(name: str, tags: Sequence[str]) -> None:
    """Name the flow run after what it did, and tag it."""
    change_run(tags, name=name[:MOST_LETTERS])


def change_run(tags: Sequence[str], **changes: Any) -> None:
    """Add tags to the flow run and apply other changes; no-op outside a flow run, and failures are only logged."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    tags = list(dict.fromkeys([*context.flow_run.tags, *tags]))[:MOST_TAGS]
    try:
        context.client.update_flow_run(context.flow_run.id, tags=tags, **changes)
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        logging.getLogger("crosscal").warning("the run has neither name nor tags: %s", error)


def shown(work: Callable[[], dict[str, Any]]) -> Any:
    """Do the work; inside a flow run return a state with a message, outside the record itself or raise.

    Inside, a `CrosscalError` becomes a failed state with its message alone: a traceback would not help the reader.
    """
    if FlowRunContext.get() is None:
        return work()
    try:
        record = work()
    except CrosscalError as error:
        return Failed(message=str(error), data=error)
    return Completed(name=_state_name(record), message=record.get("message") or cost_message(record), data=record)


def cost_message(record: dict[str, Any]) -> str:
    """Return one line on what a run computed."""
    cache, read = record["cache"], record["calibration_tokens_read"]
    seconds = sum(record["stages"].values())
    new = f"{read:,} calibration tokens read" if read or cache["misses"] else "nothing new to read"
    return f"{counted(record['variants'], 'variant')} in {seconds:.0f} s; {new}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _state_name(record: dict[str, Any]) -> str:
    """Return the state name that the UI shows for a completed run: the outcome for a landed domain's model."""
    if "runs" not in record:
        return "Completed"
    outcomes = {run["outcome"] for run in record["runs"]}
    return "Published" if "published" in outcomes else "Kept" if "kept" in outcomes else "Nothing new"
