"""Summaries that a model writes, against references and against their sources."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from crosscal.errors import EvaluationError
from crosscal.evaluation.faithfulness import Judge, risk_ratio
from crosscal.evaluation.measurement import TEST, Measurement
from crosscal.progress import Progress

ROUGE = ("rouge1", "rouge2", "rougeL")
FAITHFULNESS, RISK_RATIO = "faithfulness", "risk_ratio"
PROMPT = "{document}\n\nTL;DR:"


@dataclass(frozen=True)
class SummaryTask:
    """Documents with their references under a name."""

    name: str
    documents: tuple[tuple[str, str], ...]
    """(document, reference)."""
    prompt: str = PROMPT
    new_tokens: int = 64
    judge: str | None = None
    """Folder of a model of natural language inference; None: faithfulness is not scored."""
    judge_digest: str = ""
    """Of its files."""

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(
            json.dumps([self.documents, self.prompt, self.new_tokens, self.judge_digest]).encode()
        ).hexdigest()


def measure_summaries(
    task: SummaryTask,
    model: Any,
    tokenizer: Any,
    *,
    max_length: int,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Measurement]:
    """ROUGE-1, 2 and L (F measure) against the reference; the share of the summary's words, pairs of words and longest
    common sequence that stand in the source (`overlap_…`, ROUGE's precision); and, with a judge, faithfulness. Means
    over documents with their standard errors.

    Overlap belongs beside faithfulness: a model that only copies is faithful (arXiv 2311.09335).
    """
    started = time.perf_counter()
    prompts = [_prompt(task, document, tokenizer, max_length) for document, _ in task.documents]
    summaries = greedy(model, tokenizer, prompts, task.new_tokens, batch_tokens=batch_tokens, progress=progress)
    scores = _rouge(task, summaries)
    if task.judge is not None:
        judge = Judge.open(task.judge)
        pairs = zip(task.documents, summaries, strict=True)
        scores[FAITHFULNESS] = [judge.score(document, summary) for (document, _), summary in pairs]
    tokens, seconds = sum(map(len, prompts)), time.perf_counter() - started
    return [_measured(task.name, metric, found, tokens, seconds) for metric, found in scores.items()]


def risk_ratios(dense: Sequence[Measurement], compressed: Sequence[Measurement]) -> list[Measurement]:
    """How much less faithful a compressed model's summaries are than the dense one's of the same documents, a row for
    each task with a judge (see `faithfulness.risk_ratio`)."""
    before = {one.corpus_or_task: one.document_score for one in dense if one.metric == FAITHFULNESS}
    found = []
    for one in compressed:
        known = before.get(one.corpus_or_task)
        if one.metric == FAITHFULNESS and one.document_score and known:
            value = risk_ratio(known, one.document_score)
            found.append(Measurement(one.corpus_or_task, one.split, RISK_RATIO, value, None, 0, 0.0))
    return found


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[str]:
    """What the model writes behind each prompt, up to its end-of-text or a blank line: the likeliest token each time.

    Prompts of one length go together, so that nothing is padded and no batch changes what another would have given;
    `batch_tokens` bounds them, with what is written.
    """
    import torch

    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    written, done = [""] * len(prompts), 0
    for length, numbers in by_length.items():
        at_once = max(1, batch_tokens // (length + new_tokens))
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            tokens_BL = torch.tensor([prompts[number] for number in some]).to(model.device)
            with torch.inference_mode():
                found_BL = model.generate(
                    input_ids=tokens_BL,
                    attention_mask=torch.ones_like(tokens_BL),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,  # a model's own settings would stand otherwise
                    no_repeat_ngram_size=0,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                )
            for number, tokens_L in zip(some, found_BL[:, length:].tolist(), strict=True):
                written[number] = tokenizer.decode(tokens_L, skip_special_tokens=True).strip().split("\n\n")[0].strip()
            done += len(some)
            if progress:
                progress(done, len(prompts))
    return written


def _prompt(task: SummaryTask, document: str, tokenizer: Any, max_length: int) -> list[int]:
    """Of a document too long its end is left out; what stands around it and the summary have room."""
    head, _, tail = task.prompt.partition("{document}")
    around = len(tokenizer(head + tail, verbose=False)["input_ids"])
    room = max_length - task.new_tokens - around
    if room < 1:
        got = f"{task.new_tokens} new tokens and {around} of the prompt, for a window of {max_length}"
        raise EvaluationError("no room for a document", where=task.name, got=got, do="Lower `new_tokens`.")
    tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) > room:
        document = tokenizer.decode(tokens[:room])
    whole = tokenizer(head + document + tail, verbose=False)["input_ids"]
    excess = len(whole) - (max_length - task.new_tokens)
    return whole if excess <= 0 else whole[excess:]


def _rouge(task: SummaryTask, summaries: Sequence[str]) -> dict[str, list[float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores: dict[str, list[float]] = {name: [] for name in (*ROUGE, *(f"overlap_{name}" for name in ROUGE))}
    for (document, reference), summary in zip(task.documents, summaries, strict=True):
        to_reference, to_source = scorer.score(reference, summary), scorer.score(document, summary)
        for name in ROUGE:
            scores[name].append(to_reference[name].fmeasure)
            scores[f"overlap_{name}"].append(to_source[name].precision)
    return scores


def _measured(name: str, metric: str, found: Sequence[float], tokens: int, seconds: float) -> Measurement:
    stderr = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    kept = tuple(round(one, 6) for one in found)
    return Measurement(name, TEST, metric, fmean(found), stderr, tokens, seconds, document_score=kept)
