"""Sources of a plan's text other than plain documents: selected documents, self-generated text, random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crosscal.errors import UsageError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Select(_Section):
    """Selection among the training documents of a corpus (see `crosscal.selection`)."""

    method: Literal["dsir", "zip-fit"] | None = None
    """dsir (arXiv 2302.03169) or zip-fit (2410.18194); by default near-duplicates are dropped and nothing is scored."""
    towards: str | None = None
    """The sample that chosen documents should resemble: a corpus of this plan, or a file, folder, glob or hub dataset
    id with a column `text`. Its validation and test documents become those of the chosen corpus."""
    documents: Annotated[int, Field(ge=1)] | None = None
    """Number of documents to choose; without a method a seeded random choice, by default all."""
    seed: int = Field(0, ge=0)
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Jaccard similarity of word 5-grams from which two documents are duplicates; null: only equal ones are."""
    targets: int = Field(64, ge=1)
    """Number of documents of the sample that zip-fit compares with."""
    least_words: int = Field(100, ge=1)
    """Minimum words of a document that dsir chooses."""

    @model_validator(mode="after")
    def _is_whole(self) -> Select:
        if (self.method is None) != (self.towards is None):
            raise ValueError("`method` and `towards` come together: without a method nothing is compared")
        if self.method is not None and self.documents is None:
            raise ValueError(f"`method: {self.method}` needs `documents`: how many to choose")
        return self

    def check(self, where: str, corpora: Sequence[str], plain: Sequence[str]) -> None:
        """Raise `ValueError` if `towards` is a corpus that is no plain one; a path is checked when it is read."""
        if self.towards in corpora and self.towards not in plain:
            raise ValueError(f"{where}.towards: {self.towards!r} is no corpus of documents as they are")


def select_of(given: dict[str, Any]) -> Select:
    """Validate a selection given outside a plan. Raises `UsageError`."""
    try:
        return Select.model_validate(given)
    except ValidationError as error:
        told = [(problem["loc"], problem["msg"].removeprefix("Value error, ")) for problem in error.errors()]
        raise UsageError("; ".join(": ".join([*map(str, place), message]) for place, message in told)) from error


class SelfGenerated(_Section):
    """Self-calibration (arXiv 2410.17170): the model writes the calibration text."""

    source: Literal["self"] = "self"
    t_init: float = Field(1.0, ge=0)
    t_final: float = Field(1.0, ge=0)
    steps: int = Field(10, ge=1)
    """Tokens over which the temperature changes from t_init to t_final."""
    first_tokens: list[str] | None = None
    """Words that a text may begin with; by default English stop words; [] allows every token."""
    seeds: Name | None = None
    """A corpus of documents; every text continues the beginning of one of them (arXiv 2410.17711)."""
    prefix_tokens: int = Field(64, ge=1)
    """Length of the beginning of a document that is continued."""
    drop: float = Field(0.2, ge=0, lt=1)
    """With `seeds`: the fraction of texts that is dropped, those of the highest perplexity."""

    @model_validator(mode="after")
    def _begins_in_one_way(self) -> SelfGenerated:
        if self.seeds is not None and self.first_tokens is not None:
            raise ValueError("`first_tokens` and `seeds` both say how a text begins: leave one of them out")
        return self

    @property
    def described(self) -> str:
        return "self" if self.seeds is None else f"written by the model itself, continuing documents of {self.seeds}"

    def check(self, where: str, documents: Sequence[str], length: int) -> None:
        """Raise `ValueError` unless `seeds` is a corpus of documents whose prefixes are shorter than a window."""
        if self.seeds is not None and self.seeds not in documents:
            raise ValueError(
                f"{where}.seeds: {self.seeds!r} is no corpus of documents; those are: {', '.join(documents)}"
            )
        if self.seeds is not None and self.prefix_tokens >= length:
            what = f"{self.prefix_tokens} tokens leave nothing to write of texts of {length} (calibration.length)"
            raise ValueError(f"{where}.prefix_tokens: {what}")


class RandomTokens(_Section):
    """Uniformly random tokens: the baseline that any calibration text must beat."""

    source: Literal["random"] = "random"
    described: ClassVar = "random"
