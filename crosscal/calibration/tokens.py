"""What calibration asks of a tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscal.errors import CalibrationError
from crosscal.store import digest_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")


def tokenizer_digest(model_path: str | Path) -> str:
    """SHA-256 (hex) of the names and content of the tokenizer files in a model directory."""
    folder = Path(model_path)
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise CalibrationError(
            "no tokenizer in this model directory", where=str(folder), do="Save the tokenizer there."
        )
    lines = [f"{file.name} {digest_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of whole documents: with the special tokens the tokenizer adds by default, end-of-text last.

    Raises `CalibrationError` for a tokenizer without an end-of-text token.
    """
    end = end_token(tokenizer)
    # verbose=False: a document longer than the model's window is no mistake here, it is cut into windows
    batch = tokenizer(texts, truncation=False, verbose=False, return_attention_mask=False)["input_ids"]
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in batch]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise CalibrationError(
            "the tokenizer has no end-of-text token, so documents cannot be kept apart",
            where=str(tokenizer.name_or_path),
            do="Set eos_token in its tokenizer_config.json.",
        )
    return end


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the vocabulary without special tokens, ascending."""
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(set(tokenizer.get_vocab().values()) - special)
