"""What a run will do and need, said before it starts: `crosscal plan check`.

Nothing is drawn, generated or stored here. What cannot be known yet is said to be unknown.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from crosscal.calibration import WindowRequest, tokenizer_digest
from crosscal.calibration.pool import find_pool, most_windows
from crosscal.calibration.tokens import begin_token
from crosscal.compressors.amount import is_written_dense
from crosscal.corpora import Corpus, load_corpus
from crosscal.corpora.usable import look_at
from crosscal.errors import CorpusError, CrosscalError
from crosscal.models.source import ModelSource
from crosscal.plan import CompressionPlan, Documents, RandomTokens, SelfGenerated
from crosscal.stages.folding import unread_tokens
from crosscal.stages.memory import free_bytes
from crosscal.stages.packed_size import stored
from crosscal.stages.preflight import (
    BlockShape,
    block_shapes,
    blocks_at_once,
    evaluating_bytes,
    existing_parent,
    is_read,
    left_dense,
    matrices_of,
    moments_bytes,
    parameters_of,
    reading_bytes,
    solving_bytes,
    stored_set,
)
from crosscal.stages.sample import Draw, sums_of
from crosscal.tasks.corpora import stored_name
from crosscal.tasks.model import decoded, identify
from crosscal.tasks.refusals import refusals
from crosscal.tasks.ticket import Ticket
from crosscal.variants import Variant, samples_needed, variants


def check_plan(plan: CompressionPlan, home: str) -> dict[str, Any]:
    """The findings, as JSON: `variants`, `reading`, `memory`, `disk`, and `problems`, each with its remedy."""
    asked = variants(plan)
    findings: dict[str, Any] = {"variants": [variant.name for variant in asked]}
    if unpacked := [variant.name for variant in asked if is_written_dense([p.step for p in variant.steps])]:
        findings["written_dense"] = {"variants": unpacked, "why": "no format that engines load holds outliers"}
    problems = [str(error) for error in _unusable_sources(plan)]
    ticket = Ticket(plan.model_dump(mode="json"), home)
    try:
        known = identify(ticket)
        source = ticket.source()
        ticket = dataclasses.replace(ticket, model=known["model"], device=known["device"], dtype=known["dtype"])
        shapes = block_shapes(source, ticket.cached)
        kept = {"left_dense": left_dense(source, ticket.cached), "not_calibrated": source.uncalibrated}
        kept |= {"notes": decoded(source)}
        problems += [str(error) for error in refusals(plan, source, shapes)]
    except CrosscalError as error:
        return {**findings, "problems": [*problems, str(error)]}
    readings = [_reading(ticket, plan, source, name, seed) for name, seed in samples_needed(plan)]
    again = [_reading_again(variant, readings) for variant in ticket.variants("sequential")]
    memory = _memory(ticket, source, shapes, readings)
    disk = _disk(ticket, source, shapes, readings, again)
    findings |= {
        "model": {"path": str(source.path), "blocks": len(shapes), "device": ticket.device, "dtype": ticket.dtype}
        | kept,
        "stored": stored(source, ticket.variants(), lambda: matrices_of(source, ticket.cached)),
        "reading": [{name: value for name, value in each.items() if name != "sets"} for each in readings + again],
        "sums": sorted(ticket.cached.wanted),
        "calibration_tokens_to_read": sum(each["tokens_to_read"] for each in readings + again),
        "memory": memory,
        "disk": disk,
    }
    return {**findings, "problems": problems + _shortages(memory, disk)}


def _numbers(ticket: Ticket) -> dict[str, str]:
    return {"device": ticket.device, "dtype": ticket.dtype}


def _unusable_sources(plan: CompressionPlan) -> Iterator[CorpusError]:
    """Those that cannot be found, or whose first records are none: without the text's column, above all."""
    for documents in plan.document_corpora.values():
        for path in [documents.path] if isinstance(documents.path, str) else documents.path or []:
            try:
                problem = look_at(path, documents.text)
            except CorpusError as error:
                problem = error
            if problem:
                yield problem


def _reading(ticket: Ticket, plan: CompressionPlan, source: ModelSource, name: str, seed: int) -> dict[str, Any]:
    """What is known of one corpus in one draw, as of its last ingest."""
    calibration, origin = plan.calibration, plan.corpora[name]
    draw = Draw(
        calibration.windows,
        calibration.length,
        seed,
        calibration.held_out_windows,
        begin_token=calibration.begin_token,
        plain_text=calibration.plain_text,
    )
    asked = [draw.calibration(draw.windows), draw.held_out(draw.held_out_windows)]
    requests = [request.within(source.max_positions)[0] for request in asked]
    found: dict[str, Any] = {"corpus": name, "seed": seed, "sets": []}
    if not isinstance(origin, Documents):
        return found | _told([_generated(ticket, source, request, origin) for request in requests])
    try:
        corpus = load_corpus(ticket.store, stored_name(name, origin))
    except CorpusError:
        tokens = sum(request.windows * request.length for request in requests)
        return {**found, "state": "not ingested yet", "tokens_to_read": tokens, "tokens_cached": 0}
    return found | _told(
        [_drawn(ticket, source, corpus, request, calibration.parts_kept_apart) for request in requests]
    )


def _told(splits: Sequence[tuple[list[str | None], int, int]]) -> dict[str, Any]:
    """Of both splits: keys of sets that a solve reads, None where one is not drawn yet; tokens to read, and all."""
    keys = [key for found, _, _ in splits for key in found]
    unread = sum(to_read for _, to_read, _ in splits)
    state = "not sampled yet" if None in keys else "to read" if unread else "cached"
    cached = sum(tokens for _, _, tokens in splits) - unread
    return {"sets": keys, "state": state, "tokens_to_read": unread, "tokens_cached": cached}


def _generated(
    ticket: Ticket, source: ModelSource, request: WindowRequest, origin: SelfGenerated | RandomTokens
) -> tuple[list[str | None], int, int]:
    kind = {"source": "vocabulary"}
    if isinstance(origin, SelfGenerated):
        kind = {"source": "model", "model": ticket.model}
    begin = begin_token(source.tokenizer(), request.begin_token)
    asked = {"begin": begin, **dataclasses.replace(request, plain_text=False).provenance(begin)}
    key = stored_set(ticket.store, {"tokenizer": tokenizer_digest(source.path), **kind, **asked})
    tokens = request.windows * request.length
    return [key], 0 if is_read(ticket.cached, key, source.blocks) else tokens, tokens


def _drawn(
    ticket: Ticket, source: ModelSource, corpus: Corpus, request: WindowRequest, parts_kept_apart: int
) -> tuple[list[str | None], int, int]:
    """What was drawn already, and at most as much of later shards as the rule lets them give."""
    pool, undrawn = find_pool(ticket.store, corpus.shards, source.tokenizer(), tokenizer_digest(source.path), request)
    keys: list[str | None] = []
    unread = tokens = 0
    if pool is not None and pool.parts:
        sums = sums_of(pool, parts_kept_apart)
        keys, tokens = [part.key for part in sums.parts], sums.tokens
        unread = unread_tokens(ticket.cached, source.blocks, sums)
    windows, characters = (pool.windows, pool.characters) if pool else (0, 0)
    for shard in undrawn:
        characters += shard.characters[request.split]
        most = most_windows(request, windows, shard.characters[request.split], characters)
        windows += most
        keys.append(None)
        unread += most * request.length
        tokens += most * request.length
    return keys, unread, tokens


def _reading_again(variant: Variant, readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A sequential variant reads the windows of its mixture once more, through its own compressed blocks, unless an
    earlier run kept what it saw: that cannot be told before the windows are drawn."""
    corpora = variant.mixture.corpora if variant.mixture else ()
    mine = [reading for reading in readings if reading["corpus"] in corpora and reading["seed"] == variant.seed]
    tokens = sum(reading["tokens_to_read"] + reading["tokens_cached"] for reading in mine)
    sets = [key for reading in mine for key in reading["sets"] or (None, None)]
    found = {"variant": variant.name, "seed": variant.seed, "sets": sets, "state": "at most"}
    return {**found, "tokens_to_read": tokens, "tokens_cached": 0}


def _memory(
    ticket: Ticket, source: ModelSource, shapes: Sequence[BlockShape], readings: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """An estimate, above what this process uses already. One corpus is read at a time."""
    unread = [reading for reading in readings if reading["tokens_to_read"]]
    config = source.config.get_text_config()
    inside = sum(shape.parameters for shape in shapes)
    parameters = parameters_of(source)
    itemsize = getattr(torch, ticket.dtype).itemsize
    reading = reading_bytes(
        shapes,
        outside=parameters - inside,
        hidden=config.hidden_size,
        tokens=max((reading["tokens_to_read"] for reading in unread), default=0),
        sets=max((len(reading["sets"] or (0, 0)) for reading in unread), default=0),
        itemsize=itemsize,
        statistics=ticket.cached.wanted,
    )
    evaluating = evaluating_bytes(
        shapes,
        parameters=parameters,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        tokens=_batch_tokens(ticket.parsed, source),
        itemsize=itemsize,
        has_questions=bool(ticket.parsed.evaluate.tasks),
    )
    free = free_bytes(ticket.device)
    return {
        "device": ticket.device,
        "reading_bytes": reading if unread else 0,
        "solving_bytes": _solving_bytes(ticket, shapes, free),
        "evaluating_bytes": evaluating,
        "free_bytes": free,
    }


def _solving_bytes(ticket: Ticket, shapes: Sequence[BlockShape], free: int) -> int:
    """Of as many blocks side by side as a run takes here, or of the sequential variant that needs most."""
    threads = 1 if ticket.device.startswith("cuda") else torch.get_num_threads()
    dense, alone = ticket.variants("dense"), ticket.variants("sequential")
    sums, blocks = ticket.cached.wanted, 1
    if not ticket.has_workers:
        blocks = blocks_at_once(shapes, dense, threads=threads, free_bytes=free, statistics=sums)
    needed = [solving_bytes(shapes, [variant], lanes=threads, statistics=sums) for variant in alone]
    if dense:
        needed.append(blocks * solving_bytes(shapes, dense, lanes=threads // blocks, statistics=sums))
    return max(needed, default=0)


def _batch_tokens(plan: CompressionPlan, source: ModelSource) -> int:
    """Tokens of the whole test windows that are read at once."""
    asked = plan.evaluate.length or plan.calibration.length
    length = min(asked, source.max_positions or asked)
    return max(1, plan.evaluate.batch_tokens // length) * length


def _disk(
    ticket: Ticket,
    source: ModelSource,
    shapes: Sequence[BlockShape],
    readings: Sequence[dict[str, Any]],
    again: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """An estimate of what the store and the run directory will grow by. All models stand on the disk before they are
    measured, whether they are kept or not; a model whose blocks are solved already is counted again."""
    sets = sum(len(reading["sets"] or (0, 0)) for reading in [*readings, *again] if reading["state"] != "cached")
    checkpoint = sum(file.stat().st_size for file in set(source.weights.stored_in.values()))
    is_remote = "://" in ticket.home
    return {
        "store_bytes": moments_bytes(shapes, sets, ticket.cached.wanted),
        "models_bytes": checkpoint * len(ticket.variants()),
        "store_free_bytes": None if is_remote else _free(Path(ticket.home)),
        "models_free_bytes": _free(Path.cwd()),
        "is_one_disk": not is_remote and _device_of(Path(ticket.home)) == _device_of(Path.cwd()),
    }


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing_parent(folder)).free


def _device_of(folder: Path) -> int:
    return existing_parent(folder).stat().st_dev


def _shortages(memory: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    found = []
    for use, remedy in (
        ("reading", "Lower calibration.windows or calibration.length."),
        ("solving", "Split `compress` into several plans: all variants of a block are solved at once."),
        ("evaluating", "Lower evaluate.batch_tokens or evaluate.length; all weights of a model must fit."),
    ):
        if memory[f"{use}_bytes"] > memory["free_bytes"]:
            amounts = f"about {_gb(memory[f'{use}_bytes'])} needed, {_gb(memory['free_bytes'])} free"
            found.append(f"too little memory for {use} on {memory['device']} (got {amounts}). {remedy}")
    store, models = disk["store_bytes"], disk["models_bytes"]
    if disk["is_one_disk"]:
        store = models = store + models
    for place, needed, free in (
        ("store", store, disk["store_free_bytes"]),
        ("run directory", models, disk["models_free_bytes"]),
    ):
        if free is not None and needed > free:
            amounts = f"about {_gb(needed)} needed, {_gb(free)} free"
            found.append(
                f"too little disk for the {place} (got {amounts}). Free space, `crosscal store gc`, or move it."
            )
    return found


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
