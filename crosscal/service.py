"""The service file that `crosscal deploy` reads: GPUs, landing place, schedules. `plans/service.yaml` is an example.

Folders are relative to the file. Plans lie beside it, or are named as in the checkout or the package of each worker.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from crosscal.errors import UsageError


def _can_be_scheduled(cron: str) -> str:
    if not re.fullmatch(r"\S+( \S+){4}", cron.strip()):
        raise ValueError('a cron has five fields: "minute hour day month weekday"')
    from prefect.client.schemas.schedules import CronSchedule  # imported where it is needed: it takes seconds

    try:
        CronSchedule(cron=cron.strip())
    except ValueError as error:
        raise ValueError('not a cron that Prefect can schedule, such as "0 3 * * 0" or "*/5 * * * mon-fri"') from error
    return cron.strip()


def _in_the_checkout(plan: str) -> str:
    if Path(plan).is_absolute() or ".." in Path(plan).parts:
        raise ValueError("plans are named as in the checkout or beside this file, such as plans/landing.yaml")
    return plan


def _a_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name):
        raise ValueError("name the environment variable that holds the address, such as SLACK_URL")
    return name


Cron = Annotated[str, AfterValidator(_can_be_scheduled)]
DomainName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
PlanName = Annotated[str, AfterValidator(_in_the_checkout)]
Variable = Annotated[str, AfterValidator(_a_variable)]
Event = Literal["failed", "crashed", "given-up", "kept", "refused", "published"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Watch(_Section):
    """Schedule of the landing check: a cron (at most once a minute) or an interval in seconds."""

    cron: Cron | None = None
    every_seconds: int | None = Field(None, ge=5)

    @model_validator(mode="after")
    def _one_of_both(self) -> Watch:
        if (self.cron is None) == (self.every_seconds is None):
            raise ValueError("give either cron or every_seconds")
        return self


class Sweep(_Section):
    """Schedule of a plan that is carried out repeatedly."""

    cron: Cron = "0 3 * * 0"
    plan: PlanName = "plans/several_domains.yaml"


class Housekeeping(_Section):
    """Schedule of the clean-up, and what it removes."""

    cron: Cron = "30 4 * * *"
    unused_days: float | None = Field(None, gt=0)
    """Remove artifacts unused for this many days; null keeps all."""
    stuck_minutes: float = Field(60.0, gt=0)
    """Close a run as crashed after this many minutes without a sign of life."""
    runs_days: float | None = Field(None, ge=1)
    """Remove run directories not written to for this many days, except those of published models; null keeps all."""
    keep_published: int | None = Field(None, ge=1)
    """Keep the models of the last N moves of each domain's pointer; null keeps all."""
    watch_days: float | None = Field(7.0, gt=0)
    """Remove the server's records of watches that found nothing after this many days; null keeps all."""


class Notify(_Section):
    """Channel of messages: an environment variable with the address, read at deployment, or a block of the server."""

    slack: Variable | None = None
    """URL of an incoming webhook."""
    email: Variable | None = None
    """mailtos://user:password@smtp.example.org?from=…&to=…, in Apprise's notation."""
    webhook: Variable | None = None
    """Any URL; JSON with `text`, `subject` and `body` is posted to it."""
    block: str | None = Field(None, pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")
    """A notification block by type and name, such as slack-webhook/ops."""
    events: tuple[Event, ...] = get_args(Event)

    @property
    def channel(self) -> tuple[str, str]:
        """(kind, name of the variable or block)."""
        (found,) = ((kind, str(name)) for kind, name in self if kind != "events" and name is not None)
        return found

    @model_validator(mode="after")
    def _one_of_them(self) -> Notify:
        if sum(name is not None for kind, name in self if kind != "events") != 1:
            raise ValueError("give one of slack, email, webhook, block")
        return self


class ServiceConfig(_Section):
    """All fields of a service file (see `docs/service.md`)."""

    gpus: int = Field(1, ge=1, le=64)
    """Each GPU gets one worker, which runs one compression at a time."""
    landing: str
    """Folder or fsspec URL: documents of a domain land in <landing>/<domain>/."""
    home: str = "../.crosscal"
    """The store: a folder or an fsspec URL."""
    runs: str = "../runs"
    """Folder of the run directories."""
    plan: PlanName = "plans/landing.yaml"
    """Plan of landed domains; `$domain` is replaced by the domain's name."""
    settle_seconds: float = Field(10.0, ge=0)
    """A file is complete after this many seconds without a write, or at once with a `.done` file beside it."""
    text: dict[DomainName, ColumnName] = Field(default_factory=dict)
    """Domain → text column of its landed files, if it is not detected automatically."""
    timezone: str = "UTC"
    watch: Watch = Watch(cron="* * * * *", every_seconds=None)
    sweep: Sweep = Sweep()
    housekeeping: Housekeeping = Housekeeping()  # pyright: ignore[reportCallIssue]
    notify: tuple[Notify, ...] = ()

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("not a time zone such as UTC or Europe/Berlin") from error
        return name

    @field_validator("landing", "home")
    @classmethod
    def _holds_no_secret(cls, place: str) -> str:
        if "@" in place.partition("://")[2].split("/")[0]:
            raise ValueError("no keys in a URL: parameters are shown in the UI; the worker's environment holds them")
        return place

    @model_validator(mode="after")
    def _object_stores_know_no_use(self) -> ServiceConfig:
        if "://" in self.home and self.housekeeping.unused_days is not None:
            raise ValueError("housekeeping.unused_days: an object store does not know what is unused; leave it null")
        return self


def load_service(path: Path) -> ServiceConfig:
    """Read a service file and make its folders absolute. Raises `UsageError` naming the field and the remedy."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        what = "the service file cannot be read"
        got = str(error).replace("\n", " ")
        raise UsageError(what, where=str(path), got=got, do="plans/service.yaml is an example.") from error
    if not isinstance(data, dict):
        raise UsageError("a service file is a mapping of fields", where=str(path), got=type(data).__name__)
    try:
        config = ServiceConfig.model_validate(data)
    except ValidationError as error:
        raise UsageError("; ".join(map(_explain, error.errors())), where=str(path)) from error
    base = path.absolute().parent
    places = {name: _absolute(getattr(config, name), base) for name in ("landing", "home", "runs")}
    plan, sweep = _beside(config.plan, base), {"plan": _beside(config.sweep.plan, base)}
    return config.model_copy(update={**places, "plan": plan, "sweep": config.sweep.model_copy(update=sweep)})


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown word: the closest known word, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"


def _absolute(place: str, base: Path) -> str:
    return place if "://" in place else str((base / Path(place).expanduser()).resolve())


def _beside(plan: str, base: Path) -> str:
    return str(base / plan) if (base / plan).is_file() else plan


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        sections = {"watch": Watch, "sweep": Sweep, "housekeeping": Housekeeping, "notify": Notify}
        section = sections.get(location[0], ServiceConfig) if len(location) > 1 else ServiceConfig
        return f"{field}: unknown field; {suggestion(location[-1], section.model_fields)}"
    if problem["type"] == "missing":
        return f"{field}: this field is needed"
    message = problem["msg"].removeprefix("Value error, ")
    may_be_secret = location[:1] == ["notify"] or "@" in str(problem["input"])
    is_shown = not isinstance(problem["input"], dict) and not may_be_secret
    got = f" (got {problem['input']!r:.80})" if is_shown else ""
    return f"{field}: {message}{got}" if field else message
