"""The section `study` of a plan: the sweep for several draws of the calibration windows, and its baselines."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _different(seed: int | list[int]) -> int | list[int]:
    if seed == []:
        raise ValueError("no seed, so no draw; give a number or leave the field out")
    if isinstance(seed, list) and len(set(seed)) < len(seed):
        repeated = ", ".join(str(one) for one in dict.fromkeys(seed) if seed.count(one) > 1)
        raise ValueError(f"{repeated} more than once; every seed is one draw")
    return seed


Seeds = Annotated[int | list[int], AfterValidator(_different)]


class Study(BaseModel):
    """Settings of `crosscal study`, which tests whether the differences between the plan's variants are significant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draws: int | None = Field(None, ge=1, le=100)
    """Number of draws, with consecutive seeds from `calibration.seed` on; by default the seeds that it lists."""
    baseline: Annotated[list[str], BeforeValidator(lambda v: v if isinstance(v, list) else [v])] = ["general", "domain"]
    """What each variant is compared with: the same variant calibrated on one corpus alone (the corpus's name; `domain`:
    its own domain), or with another method (its name); or `dense`; or a variant, by its name."""
    models_at_once: int = Field(16, ge=1)
    """Maximum number of models on disk: this many are made, measured and discarded at a time."""

    def check(self, *, draws: int, keep_models: bool) -> None:
        """Raise `ValueError` if models are kept, or if `study.draws` contradicts the number of seeds (`draws`)."""
        if keep_models:
            do = "make the model that it finds with `--set study=null`"
            raise ValueError(f"execution.keep_models: a study keeps numbers, no models; {do}")
        if self.draws not in (None, draws):
            raise ValueError(f"study.draws is {self.draws}, but calibration.seed lists {draws}")


def keeping_numbers(data: Any) -> Any:
    """Return the plan's mapping; if it has a study, `execution.keep_models` defaults to false."""
    if not isinstance(data, dict) or data.get("study") is None:
        return data
    execution = data.get("execution") or {}
    return data | {"execution": {"keep_models": False, **execution}} if isinstance(execution, dict) else data
