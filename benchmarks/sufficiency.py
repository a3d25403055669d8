"""Claims: the verdict on the amount of calibration text agrees with the effect of more; leaks and inputs that are not
text are caught; clean corpora pass.

    nice -n 10 python benchmarks/sufficiency.py TESTBED [--claims overlap text verdict] [--corpora general ...]
                                             [--draws 2]

TESTBED contains `corpora/{general,biomedical,legal}` and `models/llama-mix-8m`.

* overlap: training text of the three corpora against their validation and test text: the largest share of a document,
  leaks, and the speed in MB of training text per second (one thread). Then ten test documents of each corpus are
  planted in the training documents of another one, whole, half of each, and with every tenth word changed.
* text: the measures of `text_quality` for 128 windows of each corpus, of text that the model wrote, and of input that
  is not text, and the faults that are found.
* verdict: sets of 2, 8, 32 and 128 windows of 256 tokens. The prediction of `crosscal enough` for twice as many, from
  SparseGPT at 60 % at two blocks, compared with the effect of twice as many: held-out loss, and perplexity on further
  validation windows, of SparseGPT at 70 %, all blocks, the same corpus. Means over draws, the spread is their standard
  deviation; sets of one draw are nested.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import record, write
from torch import Tensor

from crosscal.calibration import faults, text_quality
from crosscal.calibration.cutting import cut
from crosscal.calibration.overlap import overlaps
from crosscal.calibration.tokens import EncodedDocuments, begin_token, end_token
from crosscal.compressors import COMPRESSORS, LayerProblem, quadratic_loss
from crosscal.compressors.recipe import solve_many
from crosscal.evaluation import window_nll
from crosscal.files import JsonRecord, json_records
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.models.sites import replaced_parameters
from crosscal.models.walk import BlockMoments, walk
from crosscal.report.sufficiency import ADD, Point, expected_gain, verdict
from crosscal.stages.prefixes import FRACTIONS, NEEDED, Prefixes, nested_sums
from crosscal.stages.sufficiency import points_of, prefix_losses, sampled_blocks

CORPORA = ("general", "biomedical", "legal")
LENGTH, HELD_OUT, MEASURED = 256, 32, 16
MARKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SETS = (2, 8, 32, 128)
LEVEL = 0.7
PLANTED = 10
EXPECTED = "expected of twice as many: held-out loss"


def texts(testbed: Path, corpus: str, split: str) -> list[str]:
    file = testbed / "corpora" / corpus / f"{split}.jsonl.zst"
    return [row.value["text"] for row in json_records(file) if isinstance(row, JsonRecord)]


# --- overlap ---------------------------------------------------------------------------------------------------------


def overlap_rows(testbed: Path) -> list[dict[str, Any]]:
    train = {corpus: texts(testbed, corpus, "train") for corpus in CORPORA}
    held = {f"{c} ({s})": texts(testbed, c, s) for c in CORPORA for s in ("validation", "test")}
    megabytes = sum(len(text.encode()) for each in train.values() for text in each) / 1e6

    def named(side: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
        return ((name, text) for name, each in side.items() for text in each)

    started = time.process_time()
    found = overlaps(named(held), functools.partial(named, train))
    seconds = time.process_time() - started
    rows = [record("overlap, three corpora", "training text", megabytes, "MB")]
    rows.append(record("overlap, three corpora", "speed", megabytes / seconds, "MB/s of processor time"))
    for one in found:
        largest = 100 * max((each.share for each in one.largest), default=0.0)
        rows.append(record(f"overlap, {one.name}", "largest share of a document", largest, "%"))
        rows.append(record(f"overlap, {one.name}", "documents that leak", one.leaked, f"of {one.documents}"))
    tests = {name: documents for name, documents in held.items() if name.endswith("(test)")}
    for kind, changed in PLANTS.items():
        planted = dict(train)
        for corpus, into in zip(CORPORA, (*CORPORA[1:], CORPORA[0]), strict=True):
            planted[into] = [*planted[into], *map(changed, tests[f"{corpus} (test)"][:PLANTED])]
        for one in overlaps(named(tests), functools.partial(named, planted)):
            rows.append(record(f"planted: {PLANTED} {kind}", f"{one.name}, found", one.leaked, f"of {PLANTED}"))
    return rows


def _half(text: str) -> str:
    return text[: len(text) // 2]


def _edited(text: str) -> str:
    return " ".join("changed" if place % 10 == 9 else word for place, word in enumerate(text.split()))


PLANTS = {"whole documents": str, "halves of documents": _half, "documents, every tenth word changed": _edited}


# --- text ------------------------------------------------------------------------------------------------------------


def windows_of(source: ModelSource, documents: Iterable[str], count: int) -> Tensor:
    tokenizer = source.tokenizer()
    stream = EncodedDocuments(tokenizer, documents, end_token(tokenizer))
    return torch.from_numpy(np.stack([*itertools.islice(cut(stream, LENGTH, begin_token(tokenizer)), count)])).long()


def shuffled(documents: list[str], seed: int = 0) -> list[str]:
    return random.Random(seed).sample(documents, len(documents))


def text_rows(testbed: Path, source: ModelSource) -> list[dict[str, Any]]:
    general, chance = shuffled(texts(testbed, "general", "train")), random.Random(0)
    letter = (
        "Dear {}, your invoice number {} over {} dollars is due. Please pay within fourteen days by transfer to the "
        "account below, and state the number. Yours sincerely, the accounts department."
    )
    names = ("Mr Smith", "Ms Jones", "Dr Brown")
    sources: dict[str, Iterable[str]] = {
        **{corpus: shuffled(texts(testbed, corpus, "train")) for corpus in CORPORA},
        "one document again and again": general[3:4] * 3000,
        "five documents again and again": general[:5] * 800,
        "one letter, filled in": [letter.format(chance.choice(names), n, 7 * n % 900) for n in range(3000)],
        "documents of a word": [f"{chance.choice(('', 'a', 'ok', 'n/a'))}{n}" for n in range(50_000)],
        "spaces": [" " * 400 + text[:3] for text in general],
        "decimal numbers": [" ".join(f"{chance.random():.3f}" for _ in range(300)) for _ in range(500)],
    }
    sets = {name: windows_of(source, documents, 128) for name, documents in sources.items()}
    vocabulary = source.config.get_text_config().vocab_size
    sets["random tokens"] = torch.randint(3, vocabulary, (128, LENGTH), generator=torch.Generator().manual_seed(0))
    sets["written by the model"] = written(source, 32)
    rows, tokenizer = [], source.tokenizer()
    for name, tokens_SL in sets.items():
        quality = text_quality(tokens_SL, vocabulary, begin=begin_token(tokenizer), end=end_token(tokenizer))
        for figure in ("distinct_4grams", "largest_token_share", "zipf_coefficient", "repeated_tokens"):
            rows.append(record(f"text: {name}", figure.replace("_", " "), getattr(quality, figure), ""))
        per_document = quality.tokens / quality.documents
        rows.append(record(f"text: {name}", "tokens a document", per_document, ""))
        rows.append(record(f"text: {name}", "faults", len(faults(quality)), ""))
    return rows


def written(source: ModelSource, count: int) -> Tensor:
    """Sample windows from the model at temperature 1, starting at beginning-of-text."""
    model: Any = load_variant(source.path, device="cpu")
    tokenizer = source.tokenizer()
    torch.manual_seed(0)
    begin = torch.full((count, 1), begin_token(tokenizer) or 0)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": LENGTH - 1, "min_new_tokens": LENGTH - 1}
    with torch.no_grad():
        return model.generate(begin, attention_mask=torch.ones_like(begin), **options, pad_token_id=2)


# --- verdict ---------------------------------------------------------------------------------------------------------


def verdict_rows(testbed: Path, source: ModelSource, corpus: str, draws: int) -> list[dict[str, Any]]:
    held_SL = windows_of(source, shuffled(texts(testbed, corpus, "validation")), HELD_OUT + MEASURED)
    train = texts(testbed, corpus, "train")
    found = [one_draw(source, windows_of(source, shuffled(train, seed), MARKS[-1]), held_SL) for seed in range(draws)]
    rows = []
    for (n, figure), unit in found[0].units.items():
        values = [one.values[n, figure] for one in found]
        spread = statistics.stdev(values) if draws > 1 else None
        rows.append(record(f"{corpus}, {n} windows", figure, statistics.mean(values), unit, spread))
    for n in SETS:
        verdicts = [verdict(one.values[n, EXPECTED] / -100) for one in found]
        rows.append(record(f"{corpus}, {n} windows", "draws that say: add data", verdicts.count(ADD), f"of {draws}"))
    return rows


@dataclass
class Draw:
    values: dict[tuple[int, str], float] = field(default_factory=dict)
    units: dict[tuple[int, str], str] = field(default_factory=dict)

    def note(self, n: int, figure: str, value: float, unit: str = "") -> None:
        self.values[n, figure], self.units[n, figure] = value, unit


def one_draw(source: ModelSource, train_SL: Tensor, held_SL: Tensor) -> Draw:
    slices = {str(b): train_SL[a:b] for a, b in zip((0, *MARKS), MARKS, strict=False)}
    probes: dict[int, list[dict[int, tuple[float, float]]]] = {block: [] for block in range(source.blocks)}
    losses: dict[int, list[float]] = {n: [] for n in MARKS}
    weights: dict[int, dict[str, Tensor]] = {n: {} for n in MARKS[1:]}

    def on_block(seen: BlockMoments) -> None:
        for site in seen.sites:
            of_pieces = {int(n): found[site.name].only(NEEDED) for n, found in seen.moments.items() if n != "held"}
            prefixes = Prefixes(site, dict(nested_sums(of_pieces)), seen.moments["held"][site.name].only(NEEDED))
            probes[seen.block] += prefix_losses(prefixes, seen.parameters, "cpu") or []
            for n in weights:
                solved = solve(prefixes, prefixes.nested[n].hessian_II(), seen.parameters)
                losses[n] += [loss for _, loss in solved.values()]
                changed = replaced_parameters(seen.parameters, {matrix: each for matrix, (each, _) in solved.items()})
                weights[n] |= {f"{seen.name}.{name}": value for name, value in changed.items()}

    walk(source, {**slices, "held": held_SL[:HELD_OUT]}, on_block=on_block, statistics=NEEDED)
    perplexity = perplexities(source, weights, held_SL[HELD_OUT:])
    draw = Draw()
    for n in weights:
        draw.note(n, "held-out loss", statistics.mean(losses[n]))
        draw.note(n, "perplexity", perplexity[n])
    at_two = [each for block in sampled_blocks(source.blocks) for each in probes[block]]
    at_all = list(itertools.chain.from_iterable(probes.values()))
    for n in SETS:
        for name, matrices in {EXPECTED: at_two, "the same, probed at all blocks": at_all}.items():
            draw.note(n, name, -100 * (expected_gain(curve_of(matrices, n)) or 0.0), "%")
        half, whole = curve_of(at_two, n)[-2:]
        draw.note(n, "last doubling", 100 * (whole.held_out_loss / half.held_out_loss - 1), "%")
        change = 100 * (statistics.mean(losses[2 * n]) / statistics.mean(losses[n]) - 1)
        draw.note(n, "twice as many: held-out loss", change, "%")
        draw.note(n, "twice as many: perplexity", 100 * (perplexity[2 * n] / perplexity[n] - 1), "%")
    return draw


def curve_of(matrices: Sequence[Mapping[int, tuple[float, float]]], windows: int) -> list[Point]:
    """Return the learning curve of `crosscal enough` for a set: its eighth, quarter, half and whole."""
    sizes = sorted({max(1, round(fraction * windows)) for fraction in FRACTIONS})
    return points_of([{n: each[n] for n in sizes} for each in matrices], windows * LENGTH)


def solve(prefixes: Prefixes, hessian_II: Tensor, parameters: Mapping[str, Tensor]) -> dict[Any, tuple[Tensor, float]]:
    """Matrix → (solved weight, relative held-out loss)."""
    held_II, matrices = prefixes.held_out.hessian_II(), prefixes.site.matrices
    problems = [LayerProblem(matrix.name, matrix.weight_OI(parameters), hessian_II) for matrix in matrices]
    answers = solve_many(problems, [COMPRESSORS["sparsegpt"](sparsity=LEVEL)])[0]
    found = {}
    for matrix, problem, answer in zip(matrices, problems, answers, strict=True):
        change_OI = problem.weight_OI - answer.weight_OI
        loss = quadratic_loss(change_OI, held_II) / quadratic_loss(problem.weight_OI, held_II)
        found[matrix] = answer.weight_OI, loss
    return found


def perplexities(source: ModelSource, weights: Mapping[int, dict[str, Tensor]], tokens_SL: Tensor) -> dict[int, float]:
    model = load_variant(source.path, device="cpu", dtype=torch.float32)
    found = {}
    for n, changed in weights.items():
        missing = model.load_state_dict(changed, strict=False)
        assert not missing.unexpected_keys
        nll_S = window_nll(model, tokens_SL, device="cpu", batch_tokens=512)
        found[n] = float(torch.exp(nll_S.mean() / (LENGTH - 1)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--claims", nargs="*", default=["overlap", "text", "verdict"])
    parser.add_argument("--corpora", nargs="*", default=list(CORPORA))
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args()
    testbed = arguments.testbed.resolve()
    source = ModelSource.open(testbed / "models" / "llama-mix-8m")
    if "overlap" in arguments.claims:
        write("sufficiency", overlap_rows(testbed), keep=True)
    if "text" in arguments.claims:
        write("sufficiency", text_rows(testbed, source), keep=True)
    if "verdict" in arguments.claims:
        for corpus in arguments.corpora:
            write("sufficiency", verdict_rows(testbed, source, corpus, arguments.draws), keep=True)


if __name__ == "__main__":
    main()
