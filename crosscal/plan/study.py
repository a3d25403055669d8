"""The section `study` of a plan: the sweep for several draws of the calibration windows, and what to compare."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Study(BaseModel):
    """For `crosscal study`: how sure the differences between the plan's variants are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draws: int | None = Field(None, ge=1, le=100)
    """How many, by the seeds from `calibration.seed` on; left out, those that `calibration.seed` lists."""
    baseline: Annotated[list[str], BeforeValidator(lambda v: v if isinstance(v, list) else [v])] = ["general", "domain"]
    """What a variant is compared with: the same but for the corpus (a corpus's name: that corpus alone; `domain`: its
    own domain alone) or but for the method (a method's name); or `dense`; or a variant, by its name."""
    models_at_once: int = Field(16, ge=1)
    """Models on the disk at a time: so many are made and measured, then discarded."""

    def check(self, *, draws: int, keep_models: bool) -> None:
        """Raises `ValueError` for a plan of so many seeds that this is no study of."""
        if keep_models:
            do = "make the model that it finds with `--set study=null`"
            raise ValueError(f"execution.keep_models: a study keeps numbers, no models; {do}")
        if self.draws not in (None, draws):
            raise ValueError(f"study.draws is {self.draws}, but calibration.seed lists {draws}")


def keeping_numbers(data: Any) -> Any:
    """A plan's mapping; with a study in it, `execution.keep_models` is false where nothing is said."""
    if not isinstance(data, dict) or data.get("study") is None:
        return data
    execution = data.get("execution") or {}
    return data | {"execution": {"keep_models": False, **execution}} if isinstance(execution, dict) else data
