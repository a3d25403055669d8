"""The rows of a run: `results.jsonl` (one number each), `layers.jsonl` (one matrix each), `windows.jsonl` and
`questions.jsonl` (what numbers are the means of), and of a study `study.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from crosscal.errors import CrosscalError, UsageError
from crosscal.files import write_whole

NOT_EVALUATED = "not evaluated: "
"""What `skipped` begins with in rows of a model that needed no evaluation."""


@dataclass(frozen=True)
class ResultRow:
    """One measured number with its circumstances."""

    variant: str
    method: str
    """`dense` for the model as it came."""
    setting: dict[str, Any]
    """The method's own settings: `{"sparsity": 0.5}`, `{"bits": 4, "group_size": 128}`."""
    upstream: str
    mixture: dict[str, float]
    """Weight of each corpus in the Hessian; empty where no data was used."""
    corpus_or_task: str
    split: str
    metric: str
    value: float | None
    """None exactly when `skipped` says why."""
    stderr: float | None
    tokens: int
    seed: int | None
    model: str
    device: str
    seconds: float
    skipped: str | None = None
    amounts: list[dict[str, Any]] = field(default_factory=list)
    """How much the method's steps compress, in order: what `crosscal.compressors.Amount.as_row`
    says. Empty for the dense model and in rows of earlier versions."""
    begin_token: bool | None = None
    """Whether every window, or question, began with beginning-of-text; None in rows of earlier versions."""
    found_by: str | None = None
    """How the mixture was found where the plan left it open, in words; None where the plan gives it."""
    lost: int | None = None
    """Of an accuracy: questions that the dense model answers rightly and this one does not; None where not both did."""
    won: int | None = None
    """The other way round."""
    p: float | None = None
    """That there is no difference, by McNemar's exact test over those questions."""
    windows: int | None = None
    """Of a perplexity: how many windows the variant was measured on; fewer than the dense model's where it left a race,
    and then it has no value. None in rows of tasks and of earlier versions."""


@dataclass(frozen=True)
class LayerRow:
    """What solving one matrix cost and lost."""

    variant: str
    layer: str
    """Full name of the matrix, without `.weight`."""
    block: int | None
    site: str
    """Name of the input shared by the linears that read the same tensor."""
    method: str
    setting: dict[str, Any]
    loss: float | None
    """tr(dW H dW^T) on the calibration mixture, per token; None in a run that summed no H, as no method needed it."""
    relative_loss: float | None
    """loss / tr(W H W^T)."""
    heldout_relative_loss: float | None
    """The same ratio with the Hessian of held-out text; None where no such moments are kept."""
    sparsity: float
    """Fraction of zeros in the solved matrix."""
    bits: int | None
    damping: float | None
    """Fraction of the mean diagonal that was added."""
    dead_inputs: int
    tokens: int
    seconds: float
    fallback: str | None = None
    """Why the matrix stays as it came, "keep-dense: ..."; None for a solved one. Its losses of 0 are no result."""
    parameters: int | None = None
    """Entries of the matrix; None in files of an older version."""
    fold: str | None = None
    """Which module absorbed the scales of the matrix's inputs, or "none: ..." and why a method that scales them could
    not; None where no step scales."""
    mean_bits: float | None = None
    """What a weight takes with scales and outliers, in the method's own format; None where `bits` says it nearly, or no
    integers are left. The checkpoint holds such a matrix dense."""
    rank: int | None = None
    """Of the low-rank part that the adapter adds; None where there is none."""
    written_dense: str | None = None
    """Why a rounded matrix is stored as dense numbers and not packed; None where it is packed, or not rounded."""
    corpus_losses: dict[str, float] | None = None
    """The held-out ratio under each corpus's own Hessian, whatever mixture the matrix was solved on; None where no step
    of the run compares mixtures."""

    @property
    def stays_dense(self) -> bool:
        """Not solved, by a fallback or by design: to be counted, and left out of every mean."""
        return self.fallback is not None


@dataclass(frozen=True)
class WindowRow:
    """What one perplexity is the mean of: two variants of a run are compared window by window."""

    variant: str
    corpus: str
    split: str
    nll: list[float]
    """Negative log-likelihood per predicted token of each window, in the windows' order, the same for all variants.
    Of a variant that left a race those that it got, in the order in which the race gives them out."""


@dataclass(frozen=True)
class StudyRow:
    """One number of a study over its draws: of a variant by itself, or of its difference from a baseline."""

    variant: str
    """Without the draw."""
    corpus_or_task: str
    split: str
    metric: str
    rule: str | None
    """Which baseline the plan asked for: `general`, `domain`, a method, …; None for the variant by itself."""
    baseline: str | None
    """The variant that this is."""
    value: float
    """Mean over draws: the number itself, or variant − baseline; of perplexities the difference of their logarithms."""
    sd: float | None
    """Standard deviation over draws; None for one."""
    stderr: float | None
    """Standard error over test windows or questions, which all draws share."""
    interval: list[float] | None
    """Of 95 %: of a difference over `over`; of a number by itself over draws and windows or questions together."""
    over: str
    draws: int
    items: int | None
    """Test windows or questions, where both were compared one by one."""
    p: float | None = None
    p_holm: float | None = None
    """Adjusted for all comparisons of the same rule on the same corpus or task."""
    comparisons: int | None = None
    """How many these are."""
    verdict: str | None = None
    """`better`, `worse` or `not distinguishable`."""
    chosen: bool = False
    """Whether validation text chose this mixture for its recipe, level and domain."""


@dataclass(frozen=True)
class QuestionRow:
    """What one accuracy is the mean of: two variants of a run are compared question by question."""

    variant: str
    task: str
    split: str
    metric: str
    correct: list[bool]
    """Whether each question was answered right, in the task's order, the same for all variants."""


@dataclass(frozen=True)
class DocumentRow:
    """What one score of summaries is the mean of (`summaries.jsonl`)."""

    variant: str
    task: str
    split: str
    metric: str
    score: list[float]
    """Of each document, in the task's order, the same for all variants."""


Row = TypeVar("Row", ResultRow, LayerRow, WindowRow, QuestionRow, StudyRow, DocumentRow)
AnyRow = ResultRow | LayerRow | WindowRow | QuestionRow | StudyRow | DocumentRow


def write_rows(path: Path, rows: Iterable[AnyRow]) -> None:
    """Write all rows at once; a NaN or an infinity is refused, and then nothing is written."""
    write_whole(path, "".join(_line(row, path) for row in rows))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows of a file. Fields this version does not know are ignored, a missing one is an error."""
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
