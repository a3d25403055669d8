"""The plan and its sections, except `compress` and `study`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from crosscal.plan.compress import Compress
from crosscal.plan.search import corpora_named
from crosscal.plan.sources import Name, RandomTokens, Select, SelfGenerated
from crosscal.plan.study import Seeds, Study, keeping_numbers
from crosscal.plan.tasks import Task, continued_corpora

BEST = "best"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Documents(_Section):
    """Real text: a file, folder, glob or Hugging Face dataset id; or a corpus that `crosscal ingest` filled."""

    source: Literal["documents"] = "documents"
    path: str | list[str] | None = None
    """Location of the documents; by default the corpus of this name in the store is used."""
    text: str = "text"
    """Column that holds the text or the turns of a conversation; by default the form is detected from the columns:
    `text`, `messages`, `conversations`, instruction and output, prompt and response (see `crosscal.corpora.forms`)."""
    chat: Literal["template", "text"] = "template"
    """Rendering of conversations: by the model's own chat template, or their turns as plain text."""
    revision: str | None = None
    """Revision of a hub dataset."""
    split: Literal["train", "validation", "test"] | None = None
    """Put all documents into this split instead of splitting by document."""
    select: Select | None = None
    """Use a subset of the documents: similar to a sample, without near-duplicates."""

    @property
    def described(self) -> str:
        """Origin of the text, for reports."""
        if self.select is None or self.select.method is None:
            return "documents" if self.select is None else "documents, near-duplicates dropped"
        return f"documents chosen by {self.select.method} towards {self.select.towards}"


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
    """The windows that statistics are computed from."""

    windows: int = Field(128, ge=1)
    length: int = Field(2048, ge=8)
    """Tokens per window."""
    seed: Seeds = 0
    """Seed of the draw of windows; a list repeats the whole sweep for each seed."""
    held_out_windows: int = Field(16, ge=1)
    """Windows from the validation split, for the held-out layer loss."""
    parts_kept_apart: int = Field(4, ge=1, le=16)
    """Number of newest calibration sets of a growing corpus whose moments are stored separately; those of older sets
    are stored as one sum."""
    begin_token: bool | None = None
    """Whether every window, of test text as well, begins with beginning-of-text; by default as the tokenizer does."""
    plain_text: bool = False
    """Encode text that spells a special token (`</s>`) as ordinary characters, in test windows as well."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per forward pass."""
    sufficiency: bool = False
    """Report if each corpus has enough text, as `crosscal enough` does. Costs at most half a calibration pass."""


class Evaluate(_Section):
    """What is measured of every model."""

    perplexity: list[Name] | None = None
    """Corpora whose test and validation text is measured; by default all corpora of documents."""
    tasks: list[Task] = []
    """Names of lm-eval tasks, files of questions, or mappings with details (see `crosscal.plan.tasks`)."""
    windows: int = Field(64, ge=2)
    """Test windows per corpus: reports show these."""
    validation_windows: int = Field(32, ge=2)
    """Validation windows per corpus, if it has validation text: choices are based on these."""
    length: int | None = Field(None, ge=8)
    """Tokens per window; by default that of the calibration."""
    batch_tokens: int = Field(4096, ge=1)
    limit: int | None = Field(None, ge=1)
    """Questions per task; by default all."""
    allow_leaks: bool | list[str] = False
    """Continue although calibration text contains texts of an evaluation set: of any, or of these corpora and tasks."""
    screen: bool = False
    """Skip variants if another of their level loses clearly less on held-out text of every corpus; the report lists
    them with the reason."""
    race: bool = False
    """Measure all variants on a few validation windows; drop those clearly worse than another of their level on every
    corpus (the report lists them with the reason), and measure the rest on more windows, test windows and tasks."""


class Execution(_Section):
    """Where and how the run computes."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` uses a GPU if there is one."""
    keep_models: bool = True
    """Keep `models/<variant>` after its evaluation; false keeps only the measurements."""
    runner: Literal["threads", "dask"] = "threads"
    """`dask`: workers of a Dask cluster, which share the store, run the calibration passes and solve the blocks."""
    address: Annotated[str, Field(pattern=r"^(tcp|tls)://[^/\s]+$")] | None = None
    """The scheduler of a running cluster, tcp://host:port; by default workers are started on this machine."""
    workers: int | None = Field(None, ge=1)
    """Number of workers to start on this machine; by default two."""
    part_tokens: int = Field(65536, ge=1)
    """Maximum number of calibration tokens per worker task. The sums depend on it in their last digits."""

    @model_validator(mode="after")
    def _is_one_cluster(self) -> Execution:
        if (self.address is not None) + (self.workers is not None) > (self.runner == "dask"):
            raise ValueError("`runner: dask` takes an address or a number of workers; other runners take neither")
        return self


class Publish(_Section):
    """When a landed domain's new model replaces its published one (see `crosscal.publication.policy`).

    Decided on validation text, and every bound must be shown to hold: an estimate within its error of it is refused.
    """

    domain: Name
    """The corpus that the models are compressed for."""
    variant: str = BEST
    """The candidate, by name. `best`: of the variants that keep the guard and are not distinguishable from the best of
    them on the domain, the one with the lowest general perplexity."""
    tolerance: float = Field(0.0, ge=0)
    """Allowed excess over the published model's domain perplexity, as a fraction; 0: the new model must be better."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """Minimum improvement over the published model, as a fraction of perplexity; 0: any distinguishable improvement."""
    guard: dict[Name, Annotated[float, Field(ge=0)]] = {}
    """Corpus → how much worse on it the new model may be than the dense and the published one, as a fraction."""

    @property
    def corpora(self) -> list[str]:
        """The corpora whose validation text decides."""
        return list(dict.fromkeys([self.domain, *self.guard]))

    @model_validator(mode="after")
    def _asks_for_one(self) -> Publish:
        if self.tolerance and self.min_gain:
            raise ValueError("publish: `tolerance` lets a worse model in, `min_gain` asks for a better one; set one")
        return self


class CompressionPlan(_Section):
    """A complete run; `plans/` has an example for each use."""

    model: str
    revision: str | None = None
    corpora: dict[Name, CorpusSource] = Field(min_length=1)
    calibration: Calibration = Calibration()  # pyright: ignore[reportCallIssue]
    compress: list[Compress] = []
    evaluate: Evaluate = Evaluate()  # pyright: ignore[reportCallIssue]
    execution: Execution = Execution()  # pyright: ignore[reportCallIssue]
    leave_dense: list[str] = []
    """Name patterns of matrices that stay dense: `*.mixer.dt_proj`, `model.layers.0.*`."""
    publish: Publish | None = None
    """By default a landed domain's models are measured and kept in their run directory."""
    study: Study | None = None
    """For `crosscal study`: are differences between variants significant? A study keeps measurements, not models."""

    @property
    def seeds(self) -> list[int]:
        seed = self.calibration.seed
        if isinstance(seed, list):
            return seed
        return list(range(seed, seed + ((self.study and self.study.draws) or 1)))

    @property
    def document_corpora(self) -> dict[str, Documents]:
        return {name: source for name, source in self.corpora.items() if isinstance(source, Documents)}

    @property
    def perplexity_corpora(self) -> list[str]:
        chosen = self.evaluate.perplexity
        return list(self.document_corpora) if chosen is None else chosen

    @model_validator(mode="before")
    @classmethod
    def _a_study_keeps_numbers(cls, data: Any) -> Any:
        return keeping_numbers(data)

    @model_validator(mode="after")
    def _is_one_study(self) -> CompressionPlan:
        if self.study is not None:
            self.study.check(draws=len(self.seeds), keep_models=self.execution.keep_models)
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> CompressionPlan:
        for index, entry in enumerate(self.compress):
            named = list(corpora_named(entry.model_dump()))
            for name in named:
                if name not in self.corpora:
                    raise ValueError(
                        f"compress.{index}: there is no corpus {name!r}; corpora: {', '.join(self.corpora)}"
                    )
        for name, source in self.corpora.items():
            if isinstance(source, SelfGenerated):
                source.check(f"corpora.{name}", list(self.document_corpora), self.calibration.length)
            elif isinstance(source, Documents) and source.select is not None:
                plain = [other for other, documents in self.document_corpora.items() if documents.select is None]
                source.select.check(f"corpora.{name}.select", list(self.corpora), plain)
        measured = {"perplexity": self.evaluate.perplexity or [], "tasks": continued_corpora(self.evaluate.tasks)}
        for field, name in ((field, name) for field, names in measured.items() for name in names):
            if name not in self.document_corpora:
                known = ", ".join(self.document_corpora)
                raise ValueError(f"evaluate.{field}: {name!r} is no corpus of documents; those are: {known}")
        for name in self.publish.corpora if self.publish else []:
            if name not in self.perplexity_corpora:
                known = ", ".join(self.perplexity_corpora)
                raise ValueError(f"publish: the perplexity on {name!r} is not measured; corpora that are: {known}")
        if self.publish and not self.execution.keep_models:
            raise ValueError("publish: with execution.keep_models false there is no model to publish")
        return self
