"""Corpora of conversations, and windows drawn from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosscal.calibration import Pool, WindowRequest, draw_pool
from crosscal.calibration.chats import without_system
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import Corpus, ingest
from crosscal.store import Store
from tests.helpers.json_lines import jsonl
from tests.helpers.tiny_chats import chats

DIGEST = "0" * 64
CHATS = chats(120)
LENGTH = 192
EVERYTHING = WindowRequest(10_000, LENGTH)
Landing = Callable[..., Corpus]


def land(store: Store, folder: Path, rows: list[dict[str, Any]], name: str = "chats") -> Corpus:
    return ingest(store, name, [str(jsonl(folder / "a.jsonl", rows))], split="train").corpus


def rows_of(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"messages": chat} for chat in found]


def by_transformers(tokenizer: PreTrainedTokenizerFast, turns: Any) -> list[int]:
    found: Any = tokenizer.apply_chat_template(list(turns), return_dict=False)
    return found


def drawn(
    store: Store, corpus: Corpus, each: PreTrainedTokenizerFast, request: WindowRequest = EVERYTHING
) -> tuple[Pool, Tensor]:
    pool = draw_pool(store, corpus.shards, each, DIGEST, request)
    return pool, torch.cat([windows_by_key(store, part.key) for part in pool.parts])


def accepted(template: str, turns: Any) -> Any:
    return without_system(turns) if template == "no-system" else turns
