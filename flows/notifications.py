"""Notifications, as Prefect's own blocks and automations: `notify:` of the service file.

The Prefect server sends them. Addresses are secrets: they come from the environment of the deploying user, or from a
block that is already on the server, and are never shown.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import EventTrigger
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from crosscal.errors import UsageError
from crosscal.flows.deployed import NOBODY, OURS, DeployedObject, Things, essence
from crosscal.service import Notify, ServiceConfig
from crosscal.tasks.announce import FILE_REFUSED, GIVEN_UP, KEPT, PUBLISHED

NOTIFY = f"{OURS}notify-"
MADE = ("automation ", "block ")
"""Prefixes of the names of notification things (see `deployed.DeployedObject`)."""
HOURLY = datetime.timedelta(hours=1)


def _runs(state: str, *flows: str, within: datetime.timedelta = datetime.timedelta(0)) -> EventTrigger:
    """Return a trigger on runs of these flows that end in `state`, at most one per flow within the given time."""
    flow = {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}
    return EventTrigger(
        expect={f"prefect.flow-run.{state}"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=flow,
        for_each={"related:flow:prefect.resource.id"},
        within=within,
    )


def _domains(event: str) -> EventTrigger:
    return EventTrigger(expect={event}, match={"prefect.resource.id": "crosscal.*"})


OF_RUNS = {
    word: (_runs(state, "recompress"), _runs(state, "watch", "housekeeping", within=HOURLY))
    for word, state in {"failed": "Failed", "crashed": "Crashed"}.items()
}
"""A watch that cannot do its work fails every minute, so this is sent at most once an hour."""
OF_DOMAINS = {"given-up": GIVEN_UP, "kept": KEPT, "refused": FILE_REFUSED, "published": PUBLISHED}
RUN = "{{ flow.name }} · {{ flow_run.name }}"
RUN_TEXT = "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}"
DOMAIN = "{{ event.payload.domain or event.resource.id }}"
DOMAIN_TEXT = "{% for name, value in event.payload.items() %}{{ name }}: {{ value }}\n{% endfor %}"


def _chat(secret: str) -> NotificationBlock:
    """Block for an address that Prefect passes to Apprise: an incoming webhook of Slack, or `mailtos://…`."""
    return SlackWebhook(url=SecretStr(secret))


def _webhook(secret: str) -> NotificationBlock:
    said = {"text": "{{subject}}\n{{body}}", "subject": "{{subject}}", "body": "{{body}}"}
    secrets = SecretDict({"url": secret})
    hidden = {"url": "{{url}}", "secrets": secrets, "headers": None, "cookies": None}
    return CustomWebhookNotificationBlock(name="crosscal", json_data=said, **hidden)


BLOCKS: dict[str, Callable[[str], NotificationBlock]] = {"slack": _chat, "email": _chat, "webhook": _webhook}


def wanted(service: ServiceConfig) -> Iterator[DeployedObject]:
    """Yield the blocks and automations that the service file asks for. Raises `UsageError` for a missing secret."""
    for channel in service.notify:
        block = channel.block
        if block is None:
            block, made = _block(channel)
            save = partial(_save, block=made, name=block.partition("/")[2])
            yield DeployedObject(f"block {block}", _hidden(_stored(made)), save)
        for automation in _automations(channel, block):
            fields = essence(automation, {NOBODY: block})
            yield DeployedObject(
                f"automation {automation.name}", fields, partial(_put, automation=automation, block=block)
            )


def standing(client: SyncPrefectClient) -> Things:
    """Return the blocks and automations that an earlier deployment created."""
    documents = {
        each.id: (f"{each.block_type.slug}/{each.name}", each.data)
        for each in client.read_block_documents()
        if each.block_type
    }
    ours = [each for each in client.read_automations() if each.name.startswith(NOTIFY)]
    names = {key: name for key, (name, _) in documents.items()}
    return {
        **{f"block {name}": _hidden(data) for name, data in documents.values() if f"/{NOTIFY}" in name},
        **{f"automation {each.name}": essence(each, names) for each in ours},
    }


def remove(client: SyncPrefectClient, thing: str) -> None:
    """Remove a block or automation that an earlier service file asked for."""
    kind, _, name = thing.partition(" ")
    if kind == "block":
        slug, _, name = name.partition("/")
        client.delete_block_document(client.read_block_document_by_name(name, slug).id)
    else:
        for each in client.read_automations_by_name(name):
            client.delete_automation(each.id)


def _block(channel: Notify) -> tuple[str, NotificationBlock]:
    """Return a block's name on the server, which contains the variable of its secret, and the block."""
    kind, variable = channel.channel
    if not (secret := os.environ.get(variable)):
        raise UsageError(
            "this environment variable is to hold an address, and is not set",
            where=f"notify.{kind}",
            got=variable,
            do="Set it for `crosscal deploy`, or name a block of the server instead (`block: slack-webhook/ops`).",
        )
    made = BLOCKS[kind](secret)
    return f"{made.get_block_type_slug()}/{NOTIFY}{variable.lower().replace('_', '-')}", made


def _stored(block: Block) -> dict[str, Any]:
    """Return a block's settings as the server stores them."""
    fields = set(type(block).model_fields)
    return block.model_dump(mode="json", context={"include_secrets": True}, include=fields, exclude_none=True)


def _hidden(settings: Mapping[str, Any]) -> dict[str, SecretStr]:
    return {name: SecretStr(json.dumps(value, sort_keys=True)) for name, value in settings.items()}


def _automations(channel: Notify, block: str) -> Iterator[AutomationCore]:
    for word in channel.events:
        of_runs = word in OF_RUNS
        triggers = OF_RUNS[word] if of_runs else (_domains(OF_DOMAINS[word]),)
        subject, body = (RUN, RUN_TEXT) if of_runs else (DOMAIN, DOMAIN_TEXT)
        send = SendNotification(block_document_id=NOBODY, subject=f"crosscal: {subject}: {word}", body=body)
        for number, trigger in enumerate(triggers):
            name = f"{NOTIFY}{word}{'-service' * number} to {block.partition('/')[2].removeprefix(NOTIFY)}"
            yield AutomationCore(name=name, trigger=trigger, actions=[send])


def _save(_: SyncPrefectClient, block: Block, name: str) -> None:
    block.save(name, overwrite=True)


def _put(client: SyncPrefectClient, automation: AutomationCore, block: str) -> None:
    slug, _, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name, slug)
    except ObjectNotFound as error:
        do = "`prefect block ls` lists what there is; the Prefect UI makes one, under Blocks."
        raise UsageError("there is no such block on the server", where="notify.block", got=block, do=do) from error
    actions = [action.model_copy(update={"block_document_id": document.id}) for action in automation.actions]
    sending = automation.model_copy(update={"actions": actions})
    if there := client.read_automations_by_name(automation.name):
        client.update_automation(there[0].id, sending)
    else:
        client.create_automation(sending)
