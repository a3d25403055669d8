"""Checks before a run starts, for everything that would make it fail hours later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from crosscal.calibration.tokens import check_tokenizer
from crosscal.compressors.recipe import any_step, check_inputs, group_misfit, takes_two_streams
from crosscal.corpora import load_corpus
from crosscal.corpora.splits import SPLITS
from crosscal.errors import CorpusError, CrosscalError, PlanError, UsageError
from crosscal.evaluation import QuestionSuite
from crosscal.models.adapter import stacked_experts
from crosscal.models.sites import is_left, without_bias
from crosscal.models.source import ModelSource
from crosscal.plan import BEST, CompressionPlan
from crosscal.stages.preflight import BlockShape
from crosscal.store import Store
from crosscal.tasks.corpora import stored_name
from crosscal.tasks.evaluating_memory import unanswerable
from crosscal.tasks.questions import ready_tasks
from crosscal.variants import Variant, variants

MOST_NAMED = 12


def check_request(plan: CompressionPlan, source: ModelSource, shapes: Sequence[BlockShape]) -> None:
    """Raise the first error that would stop the run hours later."""
    for error in refusals(plan, source, shapes):
        raise error


def refusals(plan: CompressionPlan, source: ModelSource, shapes: Sequence[BlockShape]) -> Iterator[CrosscalError]:
    """Yield every error that would stop the run later, e.g. settings that do not fit the model, unknown tasks."""
    try:
        source.weights.check_names()
    except CrosscalError as error:
        yield error
    try:
        calibration = plan.calibration
        check_tokenizer(source.tokenizer(), calibration.begin_token, plain_text=calibration.plain_text)
    except CrosscalError as error:
        yield error
    asked = variants(plan)
    yield from misfits(asked, shapes)
    yield from unnameable(asked, stacked_experts(source.weights.model))
    yield from unpaired(asked, stacked_experts(source.weights.model))
    yield from unbiased(asked, without_bias(source.weights.model))
    names = [variant.name for variant in asked]
    if plan.publish is not None and plan.publish.variant not in (BEST, *names):
        known = f"Variants: {', '.join(names[:MOST_NAMED])}{', …' if len(names) > MOST_NAMED else ''}."
        yield PlanError("there is no such variant", where="publish.variant", got=plan.publish.variant, do=known)
    yield from unanswerable(plan, source, shapes)
    try:
        QuestionSuite.load(ready_tasks(plan), limit=plan.evaluate.limit)
    except CrosscalError as error:
        yield error


def undecidable(plan: CompressionPlan, store: Store) -> Iterator[PlanError]:
    """Yield an error for each corpus that decides about publishing and is known to have no validation text."""
    for name in plan.publish.corpora if plan.publish else ():
        documents = plan.document_corpora[name]
        got = "every document is test text"
        if documents.split != "test":
            try:
                corpus = load_corpus(store, stored_name(name, documents))
            except CorpusError:  # not ingested yet
                continue
            if corpus.documents("validation"):
                continue
            got = f"{sum(map(corpus.documents, SPLITS)):,} documents, none of them for validation"
        yield PlanError(
            "publishing is decided on validation text, and this corpus has none",
            where=f"publish: {name}",
            got=got,
            do="Give it a file named validation.jsonl, or three documents or more of no named split, to be split.",
        )


def misfits(asked: Sequence[Variant], shapes: Sequence[BlockShape]) -> Iterator[UsageError]:
    """Yield an error for n:m patterns that do not divide the inputs of some site, and for group sizes that do not
    divide those of half of the sites or more (with fewer, such sites stay dense). Each setting is reported once."""
    said: set[tuple[str, Any, int]] = set()
    for variant in asked:
        spared = _fits_most(variant, shapes)
        for shape in shapes:
            for site, inputs in shape.matrices or shape.sites:
                is_spared = spared and group_misfit(variant.steps, inputs)
                if is_spared or is_left(f"{shape.name}.{site}", variant.leave_dense):
                    continue
                error = _misfit(variant, f"{variant.name}, {shape.name}.{site}", inputs)
                setting = (error.what, error.do, inputs) if error else None
                if error and setting not in said:
                    said.add((error.what, error.do, inputs))
                    yield error


def _fits_most(variant: Variant, shapes: Sequence[BlockShape]) -> bool:
    misfits = [bool(group_misfit(variant.steps, inputs)) for shape in shapes for _, inputs in shape.sites]
    return sum(misfits) * 2 < len(misfits)


def unnameable(asked: Sequence[Variant], stacks: Sequence[str]) -> Iterator[PlanError]:
    """Yield an error for low-rank parts of stacked experts (`stacks`), which a LoRA adapter cannot name."""
    refused = [variant.name for variant in asked if any_step(variant.steps, "has_low_rank")]
    if refused and stacks:
        yield PlanError(
            "low-rank parts are stored as a LoRA adapter, which cannot name one expert of a stack",
            where=f"{stacks[0]} and {len(stacks) - 1} more" if len(stacks) > 1 else stacks[0],
            got=", ".join(refused[:MOST_NAMED]),
            do="Leave `eora` and `3basil` out for this model, or set rank: 0.",
        )


def unpaired(asked: Sequence[Variant], stacks: Sequence[str]) -> Iterator[PlanError]:
    """Yield an error for methods that pair inputs of two streams, if each stream routes its own tokens to experts."""
    refused = [variant.name for variant in asked if takes_two_streams(placed.step for placed in variant.steps)]
    if refused and stacks:
        yield PlanError(
            "behind compressed blocks other tokens are routed to an expert than in the dense model, so that its inputs "
            "have no pairs",
            where=f"{stacks[0]} and {len(stacks) - 1} more" if len(stacks) > 1 else stacks[0],
            got=", ".join(refused[:MOST_NAMED]),
            do="Leave out methods that need `cross` for this model.",
        )


def unbiased(asked: Sequence[Variant], linears: Sequence[str]) -> Iterator[PlanError]:
    """Yield an error for corrections of biases that some linears of the blocks do not have."""
    refused = [variant.name for variant in asked if any_step(variant.steps, "changes_bias")]
    if refused and linears:
        named = f"{', '.join(linears[:MOST_NAMED])}{', …' if len(linears) > MOST_NAMED else ''}"
        yield PlanError(
            "these linears have no bias to correct, and the model's config cannot say that they have one",
            where=named,
            got=", ".join(refused[:MOST_NAMED]),
            do="Leave `bias` out for this model.",
        )


def _misfit(variant: Variant, where: str, inputs: int) -> UsageError | None:
    try:
        for placed in variant.steps:
            check_inputs(placed.step, inputs, where)
    except UsageError as error:
        return error
    return None
