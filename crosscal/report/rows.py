"""The rows of a run: `results.jsonl` (one number each), `layers.jsonl` (one matrix each), `windows.jsonl`,
`questions.jsonl` and `summaries.jsonl` (the per-item values behind numbers), and `study.jsonl` of a study."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from crosscal.errors import CrosscalError, UsageError
from crosscal.files import write_whole

NOT_EVALUATED = "not evaluated: "
"""Prefix of `skipped` in rows of a model that needed no evaluation."""


@dataclass(frozen=True)
class ResultRow:
    """One measured number, with what was measured and how."""

    variant: str
    method: str
    """`dense` for the original model."""
    setting: dict[str, Any]
    """The method's own settings: `{"sparsity": 0.5}`, `{"bits": 4, "group_size": 128}`."""
    upstream: str
    mixture: dict[str, float]
    """Weight of each corpus in the Hessian; empty if no data was used."""
    corpus_or_task: str
    split: str
    metric: str
    value: float | None
    """None exactly when `skipped` gives the reason."""
    stderr: float | None
    tokens: int
    seed: int | None
    model: str
    device: str
    seconds: float
    skipped: str | None = None
    amounts: list[dict[str, Any]] = field(default_factory=list)
    """How much the method's steps compress, in order: results of `crosscal.compressors.Amount.as_row`. Empty for the
    dense model and in rows of earlier versions."""
    begin_token: bool | None = None
    """Whether every window, or question, began with beginning-of-text; None in rows of earlier versions."""
    found_by: str | None = None
    """How the mixture was searched if the plan left it open, in words; None if the plan gives it."""
    lost: int | None = None
    """For an accuracy: questions that the dense model answers correctly and this one does not; None unless both were
    measured."""
    won: int | None = None
    """The reverse: questions that only this model answers correctly."""
    p: float | None = None
    """P-value of McNemar's exact test over those questions (null hypothesis: no difference)."""
    trace_normalised: bool = False
    """Whether the Hessians of all corpora were scaled to one trace before they were mixed."""
    windows: int | None = None
    """For a perplexity: how many windows the variant was measured on; fewer than the dense model's if it left a race,
    and then it has no value. None in rows of tasks and of earlier versions."""


@dataclass(frozen=True)
class LayerRow:
    """Cost and losses of solving one matrix."""

    variant: str
    layer: str
    """Full name of the matrix, without `.weight`."""
    block: int | None
    site: str
    """Name of the input site: the tensor that one or more linears read."""
    method: str
    setting: dict[str, Any]
    loss: float | None
    """tr(dW H dW^T) on the calibration mixture, per token; None in a run that summed no H, as no method needed it."""
    relative_loss: float | None
    """loss / tr(W H W^T)."""
    heldout_relative_loss: float | None
    """The same ratio with the Hessian of held-out text; None if no such moments are kept."""
    sparsity: float
    """Fraction of zeros in the solved matrix."""
    bits: int | None
    damping: float | None
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    dead_inputs: int
    tokens: int
    seconds: float
    fallback: str | None = None
    """Why the matrix was left dense, "keep-dense: ..."; None for a solved one. Its losses of 0 are not results."""
    parameters: int | None = None
    """Entries of the matrix; None in files of an older version."""
    fold: str | None = None
    """Module that absorbed the scales of the matrix's inputs, or "none: ..." and why they could not be folded; None if
    no step scales."""
    mean_bits: float | None = None
    """Bits per weight including scales and outliers, in the method's own format; None if `bits` is close to it, or no
    integers are left. The checkpoint stores such a matrix dense."""
    rank: int | None = None
    """Rank of the low-rank part that the adapter adds; None if there is none."""
    written_dense: str | None = None
    """Why a rounded matrix is stored dense and not packed; None if it is packed, or not rounded."""
    corpus_losses: dict[str, float] | None = None
    """Held-out relative loss under each corpus's own Hessian, whatever mixture the matrix was solved on; None if no
    step of the run compares mixtures."""

    @property
    def stays_dense(self) -> bool:
        """Whether the matrix was not solved, by a fallback or by design; it is counted, and excluded from means."""
        return self.fallback is not None


@dataclass(frozen=True)
class WindowRow:
    """The per-window values behind one perplexity: two variants of a run are compared window by window."""

    variant: str
    corpus: str
    split: str
    nll: list[float]
    """Negative log-likelihood per predicted token of each window, in the windows' order, the same for all variants. For
    a variant that left a race: of the windows it was measured on, in the race's order."""


@dataclass(frozen=True)
class StudyRow:
    """One number of a study over its draws: a variant's own value, or its difference from a baseline."""

    variant: str
    """Name without the draw."""
    corpus_or_task: str
    split: str
    metric: str
    rule: str | None
    """Baseline rule of the plan: `general`, `domain`, a method, …; None for the variant's own value."""
    baseline: str | None
    """The variant that the rule gives."""
    value: float
    """Mean over draws: the value itself, or variant − baseline; for perplexities the difference of their logarithms."""
    sd: float | None
    """Standard deviation over draws; None for one."""
    stderr: float | None
    """Standard error over test windows, questions or documents, which all draws share."""
    interval: list[float] | None
    """95 % interval: of a difference over `over`; of a variant's own value over draws and windows, questions or
    documents together."""
    over: str
    draws: int
    items: int | None
    """Number of test windows, questions or documents, if both were compared one by one."""
    p: float | None = None
    p_holm: float | None = None
    """Adjusted for all comparisons of the same rule on the same corpus or task."""
    comparisons: int | None = None
    """Number of these comparisons."""
    verdict: str | None = None
    """`better`, `worse` or `not distinguishable`."""
    chosen: bool = False
    """Whether validation text chose this mixture for its recipe, level and domain."""


@dataclass(frozen=True)
class QuestionRow:
    """The per-question answers behind one accuracy: two variants of a run are compared question by question."""

    variant: str
    task: str
    split: str
    metric: str
    correct: list[bool]
    """Whether each question was answered correctly, in the task's order, the same for all variants."""


@dataclass(frozen=True)
class DocumentRow:
    """The per-document values behind one score of summaries (`summaries.jsonl`)."""

    variant: str
    task: str
    split: str
    metric: str
    score: list[float]
    """The score of each document, in the task's order, the same for all variants."""


Row = TypeVar("Row", ResultRow, LayerRow, WindowRow, QuestionRow, StudyRow, DocumentRow)
AnyRow = ResultRow | LayerRow | WindowRow | QuestionRow | StudyRow | DocumentRow


def write_rows(path: Path, rows: Iterable[AnyRow]) -> None:
    """Write all rows at once. Raises `CrosscalError` for a NaN or an infinity; then nothing is written."""
    write_whole(path, "".join(_line(row, path) for row in rows))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows of a file. Unknown fields are ignored; a missing one raises `UsageError`."""
    with path.open(encoding="utf-8") as lines:
        return [_parse(line, kind, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _line(row: AnyRow, path: Path) -> str:
    try:
        return json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise CrosscalError(
            "a row holds a number that is not finite, nothing was written",
            where=f"{path}, variant {row.variant}",
            got=repr(row),
        ) from error


def _parse(line: str, kind: type[Row], where: str) -> Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UsageError("not a line of JSON", where=where, got=str(error)) from error
    if not isinstance(found, dict):
        raise UsageError("not an object", where=where)
    required = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    missing = [name for name in required if name not in found]
    if missing:
        raise UsageError(
            f"no {', '.join(missing)} in a {kind.__name__}", where=where, do="Was the file written by crosscal?"
        )
    return kind(**{one.name: found[one.name] for one in fields(kind) if one.name in found})
