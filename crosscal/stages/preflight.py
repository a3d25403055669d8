"""Estimate what a run will need before it starts: block shapes, bytes of memory and disk, and what is stored already.

The estimates use a skeleton on the meta device. Sites are exact if the model was calibrated before. Otherwise all
linears of a module but the last are assumed to share their input with those of equal width (q, k, v; gate, up), and the
last to read their result: exact for the Llama, GPT-2, OPT and NeoX families, within a third elsewhere.

Shapes: I inputs of a site, O outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from crosscal.evaluation.logits import row_bytes, rows_at_once
from crosscal.models import experts
from crosscal.models.blocks import find_blocks
from crosscal.models.sites import Matrices, is_linear
from crosscal.models.source import ModelSource
from crosscal.models.walk import survey
from crosscal.stages.block_problem import gradients_needed
from crosscal.stages.folding import SumStore
from crosscal.stages.moments import CachedMoments
from crosscal.stages.spill import SHARE as HIDDEN_SHARE
from crosscal.statistics import EVERY, OF_TWO_STREAMS, VECTORS, Mixture, Statistic, streams_of
from crosscal.variants import Variant

SUM_BYTES = 4
"""Moments are summed and solved in float32 (float64 passes are not estimated)."""
SHARE = 0.5
"""Share of the free memory that blocks being solved may take."""
LARGEST_SITE = 0.5
"""Share of a block's parameters in the site with the most rows: gate and up of a Llama have about half."""
ANSWER_COPIES = 1.4
"""Final memory of a solution, as a multiple of its float32 weights; measured (`tests/test_stages_memory.py`)."""
REFERENCE = ""
"""Placeholder for the corpus on which losses of methods without data are measured."""
STORED_SHARE = 0.42
"""Share of a float32 Gram matrix: the upper triangle in compressed byte planes (`store.moments`); 0.35-0.45 seen."""

STORED_GRADIENTS = 0.75
"""Stored size of squared gradients, as a share of float32 (`benchmarks/gradients.py`)."""
ACTIVATIONS = (16, 4)
"""Numbers per token that autograd keeps of a block, as multiples of the hidden size and of the feed-forward inner
width; more in families that compute attention with a full score matrix (`tests/test_stages_gradients.py`)."""
ARTIFACT_BYTES = 1800
"""Headers and manifest of an artifact with little content."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one decoder block."""

    name: str
    sites: tuple[tuple[str, int], ...]
    """(name, I) of every input site."""
    parameters: int
    stored_bytes: int
    matrices: tuple[tuple[str, int], ...] = ()
    """(name, I) of every matrix of the sites; empty if the sites are estimates."""

    @property
    def gram_bytes(self) -> int:
        """Bytes of one float32 matrix [I, I] per site, for one calibration set: 4 · Σ I² over the sites."""
        return sum(inputs * inputs for _, inputs in self.sites) * SUM_BYTES

    @property
    def vector_bytes(self) -> int:
        """Stored bytes of the small sums of one calibration set."""
        return sum(inputs for _, inputs in self.sites) * len(VECTORS) * SUM_BYTES

    def summed_bytes(self, statistics: Collection[Statistic]) -> int:
        """Return the bytes of one calibration set's sums during a pass; vectors are summed in float64."""
        return 2 * self.vector_bytes + self.gram_bytes * sum(which.is_matrix for which in statistics)


def block_shapes(source: ModelSource, cached: CachedMoments) -> list[BlockShape]:
    """Return the shape of every block of a model, without reading weights."""
    shapes = []
    for index, block in enumerate(find_blocks(source.weights.model)[1]):
        known = cached.sites(index)
        sites = [(site.name, site.inputs) for site in known] if known else list(_likely_sites(block))
        matrices = tuple((matrix.name, site.inputs) for site in known or () for matrix in site.matrices)
        parameters = sum(parameter.numel() for parameter in block.parameters())
        stored_bytes = parameters * source.dtype.itemsize
        shapes.append(BlockShape(source.block_name(index), tuple(sites), parameters, stored_bytes, matrices))
    return shapes


def matrices_of(source: ModelSource, cached: CachedMoments) -> list[Matrices]:
    """Return the matrices of every block: as stored by an earlier calibration, or else as a survey finds them."""
    known = [found for block in range(source.blocks) if (found := cached.matrices(block)) is not None]
    return known if len(known) == source.blocks else survey(source)


def _likely_sites(block: nn.Module) -> Iterator[tuple[str, int]]:
    for parent_name, parent in block.named_modules():
        if experts.is_experts(parent):
            for part in (experts.up_name(parent), "down_proj"):
                shape = parent.get_parameter(part).shape
                inputs = shape[-2] if parent.is_transposed else shape[-1]
                yield from ((f"{parent_name}.{expert}.{part}", int(inputs)) for expert in range(shape[0]))
        linears = [(name, _inputs(module)) for name, module in parent.named_children() if is_linear(module)]
        widths: set[int] = set()
        for name, inputs in linears:
            is_last = name == linears[-1][0] and len(linears) > 1
            if is_last or inputs not in widths:
                yield f"{parent_name}.{name}".removeprefix("."), inputs
            widths.add(inputs)


def _inputs(linear: nn.Module) -> int:
    return int(linear.get_parameter("weight").shape[1 if isinstance(linear, nn.Linear) else 0])


def moments_bytes(shapes: Sequence[BlockShape], sets: int, statistics: Collection[Statistic] = EVERY) -> int:
    """Return the bytes on disk for `sets` calibration and held-out sets: the vectors, and for every wanted matrix about
    0.42 · 4 bytes · Σ I², twice as much if it is not symmetric."""
    artifacts = len({which.stored_in for which in statistics})
    small = sum(shape.vector_bytes + artifacts * ARTIFACT_BYTES * len(shape.sites) for shape in shapes)
    triangles = sum((1 if which.is_symmetric else 2) for which in statistics if which.is_matrix)
    grams = sum(shape.gram_bytes for shape in shapes)
    return round(STORED_SHARE * triangles * grams + small) * sets


def reading_bytes(
    shapes: Sequence[BlockShape],
    *,
    outside: int,
    hidden: int,
    tokens: int,
    sets: int,
    itemsize: int,
    statistics: Collection[Statistic] = EVERY,
) -> int:
    """Return the bytes of memory of one pass over a model: hidden states of all `tokens`, in one stream or two, and the
    larger of two phases.

    First the parameters outside the blocks (`outside` of them) and one block; then two blocks, one of them prefetched,
    with the sums of a block for every set.
    """
    block = max(shape.parameters for shape in shapes) * itemsize
    sums = max(shape.summed_bytes(statistics) for shape in shapes) * sets
    states = streams_of(statistics) * tokens * hidden * itemsize
    return states + max(outside * itemsize + block, 2 * block + sums)


def gradients_bytes(shapes: Sequence[BlockShape], sets: int) -> int:
    """Return the bytes on disk for `sets` calibration sets: as many numbers as the blocks have parameters."""
    return (
        round(sum(STORED_GRADIENTS * s.parameters * SUM_BYTES + ARTIFACT_BYTES * len(s.sites) for s in shapes)) * sets
    )


def walking_back_bytes(
    shapes: Sequence[BlockShape],
    *,
    outside: int,
    hidden: int,
    vocabulary: int,
    length: int,
    windows: int,
    tokens: int,
    sets: int,
    itemsize: int,
    free_bytes: int,
) -> int:
    """Return the bytes of memory of the gradients over `tokens`, with `windows` windows of `length` at once.

    Every block's inputs and the last one's outputs, unless they are on disk because they take more than half of the
    free memory; and the larger of two phases. At the head: the parameters outside the blocks, and logits, twice, with
    their gradient. In the blocks: two of them, one prefetched; the sums of two for every set, one being stored; and per
    window the activations and the gradients of a block, twice, as allocators release memory late. Of matrices below
    32 MiB glibc keeps more for reuse (`lanes`): with two windows the resident peak was 10 to 28 % above this.
    """
    inputs = (len(shapes) + 1) * tokens * hidden * itemsize
    block = max(shape.parameters for shape in shapes)
    widest = max(width for shape in shapes for _, width in shape.sites)
    kept = length * (ACTIVATIONS[0] * hidden + ACTIVATIONS[1] * widest) * itemsize
    head = outside * itemsize + windows * length * vocabulary * (2 * SUM_BYTES + itemsize)
    back = 2 * block * itemsize + 2 * block * SUM_BYTES * sets + windows * (kept + 2 * block * itemsize)
    return (inputs if inputs <= HIDDEN_SHARE * free_bytes else 0) + max(head, back)


def solving_bytes(
    shapes: Sequence[BlockShape],
    variants: Sequence[Variant],
    *,
    lanes: int,
    statistics: Collection[Statistic] = EVERY,
) -> int:
    """Return the bytes of memory of solving one block with `lanes` worker threads, above what the process already uses:
    the larger of two phases, plus the block's weights and the file they were read from.

    While the widest site is solved, which comes first: one Hessian per corpus, seed and split (`SiteStatistics`); three
    matrices per group in progress (its Hessian, the factor, one more); for every sum of two streams as many again, but
    no factor; the solutions for this site; and the column loops of the other threads. At the end: every solution, as
    solved and as stored, as not all freed memory returns to the system; and the loops.
    """
    shape = max(shapes, key=lambda each: each.parameters)
    widths = [inputs for each in shapes for _, inputs in each.sites]
    groups = {(v.mixture, v.seed, v.trace_normalised) for v in variants}
    reference = Mixture.of({REFERENCE: 1.0})
    drawn = {(corpus, v.seed) for v in variants for mixture in v.mixtures(reference) for corpus in mixture.corpora}
    lanes = min(lanes, len(groups) * len(shape.sites))
    at_widest = min(lanes, len(groups))
    members = -(-len(variants) // max(1, len(groups)))
    loop = (1 + 2 * members) * shape.parameters * SUM_BYTES * LARGEST_SITE
    held = (2 * len(drawn) + 3 * at_widest) if Statistic.GRAM in statistics else 0
    held += (2 * len(drawn) + 2 * at_widest) * len(OF_TWO_STREAMS & set(statistics))
    matrices = held * max(widths) ** 2 * SUM_BYTES
    squares = gradients_needed(variants, reference)
    # Squared gradients of each corpus, and mixed, are as large as the weights of the site.
    matrices += (len(squares) + at_widest) * shape.parameters * LARGEST_SITE * SUM_BYTES if squares else 0
    answers = len(variants) * max(widths) * min(widths) * SUM_BYTES
    all_answers = len(variants) * shape.parameters * SUM_BYTES * ANSWER_COPIES
    solving = max(matrices + answers + (lanes - at_widest + 1) * loop, all_answers + lanes * loop)
    return 2 * shape.stored_bytes + round(solving)


def blocks_at_once(
    shapes: Sequence[BlockShape],
    variants: Sequence[Variant],
    *,
    threads: int,
    free_bytes: int,
    statistics: Collection[Statistic] = EVERY,
) -> int:
    """Return how many blocks to solve in parallel, with the threads divided among them: as many as fit in half of the
    free memory, at least one."""
    wanted = range(min(threads, len(shapes)), 1, -1)
    needed = {n: n * solving_bytes(shapes, variants, lanes=threads // n, statistics=statistics) for n in wanted}
    return next((number for number in wanted if needed[number] <= SHARE * free_bytes), 1)


@dataclass(frozen=True)
class EvaluationSizes:
    """What the memory of an evaluation depends on, besides the model's blocks."""

    parameters: int
    """Parameters of the whole model."""
    hidden: int
    vocabulary: int
    tokens: int
    """Per batch."""
    itemsize: int
    """Bytes per number of the dtype of weights and activations."""


def evaluating_bytes(shapes: Sequence[BlockShape], sizes: EvaluationSizes, *, has_questions: bool = False) -> int:
    """Return the bytes of memory of evaluating one model.

    All weights; per token, three times the feed-forward part's inner width and twice the hidden size; and the logits
    that are held at once (`evaluation.logits`), their maximum if there are questions.
    """
    widest = max(inputs for shape in shapes for _, inputs in shape.sites)
    rows = rows_at_once(sizes.vocabulary, sizes.itemsize)
    logits = (rows if has_questions else min(sizes.tokens, rows)) * row_bytes(sizes.vocabulary, sizes.itemsize)
    return (sizes.parameters + sizes.tokens * (2 * sizes.hidden + 3 * widest)) * sizes.itemsize + logits


def is_read(cached: SumStore, calibration: str | None, blocks: int) -> bool:
    """Whether every block's sums over a calibration set are in the store."""
    return calibration is not None and all(cached.has(calibration, block) for block in range(blocks))


def existing_parent(path: Path) -> Path:
    """Return the nearest existing folder at or above `path`: a new folder will be on its disk."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
