"""Estimate whether models are measured whole, or block by block because they do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from crosscal.errors import PlanError
from crosscal.models.source import ModelSource
from crosscal.plan import CompressionPlan
from crosscal.stages.by_blocks import evaluating_by_blocks_bytes
from crosscal.stages.memory import usable_bytes
from crosscal.stages.preflight import BlockShape, EvaluationSizes, evaluating_bytes
from crosscal.tasks.run_spec import resolve_device


@dataclass(frozen=True)
class EvaluatingMemory:
    """Estimates of the memory that measuring one model takes."""

    whole_bytes: int
    by_blocks_bytes: int
    """With the weights of one block in memory at a time."""
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.whole_bytes <= self.free_bytes

    @property
    def is_by_blocks(self) -> bool:
        """Whether the model does not fit and this takes less memory, which it need not with few blocks."""
        return not self.fits and self.by_blocks_bytes < self.whole_bytes

    @property
    def needed_bytes(self) -> int:
        return self.by_blocks_bytes if self.is_by_blocks else self.whole_bytes

    @property
    def text(self) -> str:
        return f"about {self.whole_bytes / 1e9:.1f} GB needed, {self.free_bytes / 1e9:.1f} GB free"


def evaluating_memory(plan: CompressionPlan, source: ModelSource, shapes: Sequence[BlockShape]) -> EvaluatingMemory:
    """Estimate the memory for the plan's device, with the memory that is free there now."""
    device = resolve_device(plan.execution.device)
    config, free = source.config.get_text_config(), usable_bytes(device)
    length = _length(plan, source)
    windows = len(plan.perplexity_corpora) * (plan.evaluate.windows + plan.evaluate.validation_windows)
    sizes = EvaluationSizes(
        parameters=source.parameters,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        tokens=max(1, plan.evaluate.batch_tokens // length) * length,
        itemsize=(torch.float32 if device == "cpu" else source.dtype).itemsize,
    )
    whole = evaluating_bytes(shapes, sizes, has_questions=bool(plan.evaluate.tasks))
    by_blocks = evaluating_by_blocks_bytes(shapes, sizes, all_tokens=windows * length, free_bytes=free)
    return EvaluatingMemory(whole, by_blocks, free)


def unanswerable(plan: CompressionPlan, source: ModelSource, shapes: Sequence[BlockShape]) -> Iterator[PlanError]:
    """Yield an error for tasks if the model does not fit in memory: each answer takes its own forward pass."""
    if plan.evaluate.tasks and not (memory := evaluating_memory(plan, source, shapes)).fits:
        yield PlanError(
            "a model that does not fit in memory is measured block by block: on texts, not by tasks",
            where="evaluate.tasks",
            got=memory.text,
            do="Leave `evaluate.tasks` out, or run where the whole model fits.",
        )


def _length(plan: CompressionPlan, source: ModelSource) -> int:
    asked = plan.evaluate.length or plan.calibration.length
    return min(asked, source.max_positions or asked)
