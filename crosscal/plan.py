"""The whole run in one typed file: what to read, how to calibrate, what to solve, what to measure.

A plan is read from YAML and checked once, here; every default is written back by `dump`. Any list in an entry of
`compress` (or in `calibration.seed`) is an axis of a sweep; `crosscal.variants` expands them.
Relative paths are relative to the plan file.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from crosscal.errors import PlanError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Documents(_Section):
    """Real text: a file, folder, glob or Hugging Face dataset id; or a corpus that `crosscal ingest` filled."""

    source: Literal["documents"] = "documents"
    path: str | list[str] | None = None
    """Where the documents are; left out, the corpus of this name in the store is used."""
    text: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Revision of a hub dataset."""
    split: Literal["train", "validation", "test"] | None = None
    """Put all documents into this split instead of splitting by document."""


class SelfGenerated(_Section):
    """Self-calibration (arXiv 2410.17170): the model writes the calibration text."""

    source: Literal["self"] = "self"
    t_init: float = Field(1.0, ge=0)
    t_final: float = Field(1.0, ge=0)
    steps: int = Field(10, ge=1)
    """Tokens over which the temperature goes from t_init to t_final."""
    first_tokens: list[str] | None = None
    """Words a text may begin with; left out, English stop words; [] allows every token."""


class RandomTokens(_Section):
    """Uniformly random tokens: the floor that any calibration must beat."""

    source: Literal["random"] = "random"


def _corpus(value: Any) -> Any:
    if isinstance(value, str) and value in ("self", "random"):
        return {"source": value}
    if isinstance(value, str | list):
        return {"source": "documents", "path": value}
    if isinstance(value, dict) and "source" not in value:
        return {"source": "documents", **value}
    return {"source": "documents"} if value is None else value


CorpusSource = Annotated[
    Documents | SelfGenerated | RandomTokens, Field(discriminator="source"), BeforeValidator(_corpus)
]


class Calibration(_Section):
    windows: int = Field(128, ge=1)
    length: int = Field(2048, ge=8)
    """Tokens a window."""
    seed: int | list[int] = 0
    """Which windows are drawn; a list repeats the whole sweep for each."""
    held_out_windows: int = Field(16, ge=1)
    """Windows from the validation split, for the held-out layer error."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens a forward pass."""


def _axis(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _settings(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class Compress(_Section):
    """One entry of the sweep; every field but `trace_normalised` may be a list."""

    method: Annotated[list[str], BeforeValidator(_axis)]
    sparsity: Annotated[list[float | str] | None, BeforeValidator(lambda v: v if v is None else _axis(v))] = None
    bits: Annotated[list[int] | None, BeforeValidator(lambda v: v if v is None else _axis(v))] = None
    group_size: Annotated[list[int | None], BeforeValidator(_axis)] = [128]
    activation_order: Annotated[list[bool], BeforeValidator(_axis)] = [False]
    damping: Annotated[list[float], BeforeValidator(_axis)] = [0.01]
    domain: Annotated[list[Name] | None, BeforeValidator(lambda v: v if v is None else _axis(v))] = None
    alpha: Annotated[list[Annotated[float, Field(ge=0, le=1)]], BeforeValidator(_axis)] = [0.5]
    """Weight of the domain; 1 - alpha is the general corpus's."""
    mixture: Annotated[list[dict[Name, float]] | None, BeforeValidator(_settings)] = None
    """Weights over any corpora, instead of `domain` and `alpha`."""
    upstream: Annotated[list[Literal["dense", "sequential"]], BeforeValidator(_axis)] = ["dense"]
    """Inputs of the dense model (cached), or recomputed after each compressed block as the published loops do."""
    trace_normalised: bool = False
    """Scale the Hessians of a site to one trace before mixing."""
    fallback: Literal["keep-dense"] | None = None
    """What to do with a matrix whose statistics cannot be solved; left out, the run stops with the reason."""


class Evaluate(_Section):
    perplexity: list[Name] | None = None
    """Corpora whose test split is measured; left out, all with documents."""
    tasks: list[str] = []
    """lm-eval task names, or files of questions (.jsonl, .jsonl.zst)."""
    windows: int = Field(64, ge=2)
    length: int | None = Field(None, ge=8)
    """Tokens a test window; left out, that of the calibration."""
    batch_tokens: int = Field(4096, ge=1)
    limit: int | None = Field(None, ge=1)
    """Questions per task; left out, all."""


class Execution(_Section):
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    keep_models: bool = True
    """Keep `models/<variant>` after its evaluation; false keeps the numbers alone."""
    runner: Literal["threads", "dask"] = "threads"
    """`dask`: windows are read and blocks are solved by the workers of a Dask cluster, which share the store."""
    address: Annotated[str, Field(pattern=r"^(tcp|tls)://[^/\s]+$")] | None = None
    """The scheduler of a running cluster, tcp://host:port; left out, workers are started on this machine."""
    workers: int | None = Field(None, ge=1)
    """How many to start on this machine; left out, two."""
    part_tokens: int = Field(65536, ge=1)
    """Most calibration tokens that a worker reads at a time. The sums depend on it in their last digits."""

    @model_validator(mode="after")
    def _is_one_cluster(self) -> Execution:
        if (self.address is not None) + (self.workers is not None) > (self.runner == "dask"):
            raise ValueError("`runner: dask` takes an address or a number of workers; other runners take neither")
        return self


class CompressionPlan(_Section):
    """A complete run; see `plans/` for one per use."""

    model: str
    revision: str | None = None
    corpora: dict[Name, CorpusSource] = Field(min_length=1)
    calibration: Calibration = Calibration()  # pyright: ignore[reportCallIssue]
    compress: list[Compress] = []
    evaluate: Evaluate = Evaluate()  # pyright: ignore[reportCallIssue]
    execution: Execution = Execution()  # pyright: ignore[reportCallIssue]

    @property
    def seeds(self) -> list[int]:
        return self.calibration.seed if isinstance(self.calibration.seed, list) else [self.calibration.seed]

    @property
    def document_corpora(self) -> dict[str, Documents]:
        return {name: source for name, source in self.corpora.items() if isinstance(source, Documents)}

    @property
    def perplexity_corpora(self) -> list[str]:
        chosen = self.evaluate.perplexity
        return list(self.document_corpora) if chosen is None else chosen

    @model_validator(mode="after")
    def _names_exist(self) -> CompressionPlan:
        for index, entry in enumerate(self.compress):
            named = [*(entry.domain or []), *(name for weights in entry.mixture or [] for name in weights)]
            for name in named:
                if name not in self.corpora:
                    raise ValueError(
                        f"compress.{index}: there is no corpus {name!r}; corpora: {', '.join(self.corpora)}"
                    )
        for name in self.evaluate.perplexity or []:
            if name not in self.document_corpora:
                known = ", ".join(self.document_corpora)
                raise ValueError(f"evaluate.perplexity: {name!r} is no corpus of documents; those are: {known}")
        return self


def load_plan(path: Path, overrides: tuple[str, ...] = ()) -> CompressionPlan:
    """Read a plan and apply `key.path=value` overrides. Raises `PlanError` naming the field and the remedy."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            "the plan cannot be read", where=str(path), got=str(error), do="Give the path of a YAML file."
        ) from error
    try:
        data = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise PlanError("the plan is not valid YAML", where=str(path), got=str(error).replace("\n", " ")) from error
    if not isinstance(data, dict):
        raise PlanError(
            "a plan is a mapping of fields",
            where=str(path),
            got=type(data).__name__,
            do="Start with `model:` and `corpora:`.",
        )
    for override in overrides:
        _apply(data, override)
    return parse_plan(data, str(path), path.absolute().parent)


def parse_plan(data: dict[str, Any], where: str = "plan", base: Path | None = None) -> CompressionPlan:
    """Check a mapping; relative paths are resolved against `base`."""
    try:
        plan = CompressionPlan.model_validate(data)
    except ValidationError as error:
        raise PlanError(_explain(error), where=where) from error
    return _resolve(plan, base) if base else plan


def dump_plan(plan: CompressionPlan) -> str:
    """The plan with every default written out, as YAML that `load_plan` reads back to an equal plan."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, width=120)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise PlanError("--set needs key=value", got=override, do="For example --set calibration.windows=64.")
    *parents, last = key.split(".")
    node: Any = data
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(value)
    except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise PlanError(
            "--set names no field of the plan", got=override, do="Lists are counted from 0: compress.0.alpha=[0,1]."
        ) from error


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_FILE = re.compile(r".*\.(txt|jsonl?|csv|parquet)(\.gz|\.zst)?", re.IGNORECASE)


def _resolve(plan: CompressionPlan, base: Path) -> CompressionPlan:
    def absolute(path: str) -> str:
        if "://" in path:
            return path
        here = base / Path(path).expanduser()  # an absolute path stays what it is
        if here.exists():
            return str(here.resolve())
        return path if _HUB_ID.fullmatch(path) and not _FILE.fullmatch(path) else str(here)

    corpora = dict(plan.corpora)
    for name, source in plan.document_corpora.items():
        if source.path is not None:
            paths = [source.path] if isinstance(source.path, str) else source.path
            corpora[name] = source.model_copy(update={"path": [absolute(path) for path in paths]})
    tasks = [absolute(task) if task.endswith((".jsonl", ".zst", ".gz")) else task for task in plan.evaluate.tasks]
    evaluate = plan.evaluate.model_copy(update={"tasks": tasks})
    return plan.model_copy(update={"model": absolute(plan.model), "corpora": corpora, "evaluate": evaluate})


def _fields(location: tuple[Any, ...]) -> list[str]:
    """Field names of the section a location points into, for suggestions."""
    sections: dict[str, type[BaseModel]] = {
        "calibration": Calibration,
        "compress": Compress,
        "evaluate": Evaluate,
        "execution": Execution,
    }
    if len(location) == 1:
        return list(CompressionPlan.model_fields)
    section = sections.get(str(location[0]))
    if location[0] == "corpora":
        kinds = {"self": SelfGenerated, "random": RandomTokens}
        section = kinds.get(str(location[2]) if len(location) > 2 else "", Documents)
    return list(section.model_fields) if section else []


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = problem["loc"]
        field = ".".join(str(part) for part in location if part not in ("documents",)) or "plan"
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(location[-1]), _fields(location), n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(_fields(location))}"
            lines.append(f"{field}: unknown field; {remedy}")
        elif problem["type"] == "missing":
            lines.append(f"{field}: this field is needed")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = f" (got {problem['input']!r:.80})" if location else ""
            lines.append(f"{field}: {message}{got}" if location else message)
    return "; ".join(dict.fromkeys(lines))
