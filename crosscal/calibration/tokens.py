"""Tokenizer helpers: digest, encoding of documents, special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from crosscal.calibration.chats import ChatReader, RenderedChat, written_begin
from crosscal.corpora.conversation import Conversation
from crosscal.errors import CalibrationError
from crosscal.store import digest_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Readable = str | Conversation
BATCH_DOCUMENTS = 64
_PROBE = "a"  # a text that spells no special token
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")


def tokenizer_digest(model_path: str | Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of the tokenizer files in a model directory."""
    folder = Path(model_path)
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise CalibrationError(
            "no tokenizer in this model directory", where=str(folder), do="Save the tokenizer there."
        )
    lines = [f"{file.name} {digest_file(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class EncodedDocuments:
    """Iterates over documents as token ids, encoded lazily; counts what was yielded so far.

    A text is encoded with the special tokens that the tokenizer adds by default, and closed by `end` if it does not end
    with it already. A conversation is rendered by the chat template, which closes turns itself, and skipped if the
    template refuses it. Text that spells a special token becomes that token, unless `plain_text`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Iterable[Readable],
        end: int | None,
        *,
        plain_text: bool = False,
    ) -> None:
        if plain_text:
            _check_plain_text(tokenizer)
        self._tokenizer, self._documents, self._end = tokenizer, iter(documents), end
        self._options: dict[str, Any] = {"split_special_tokens": True} if plain_text else {}
        self._chats = ChatReader(tokenizer, plain_text=plain_text)
        self.tokens = self.characters = 0
        self.spelling = 0
        """Documents whose text spells a special token that was tokenized as one."""

    @property
    def said(self) -> dict[str, int]:
        """Statement about some conversations → number of conversations it applies to."""
        return dict(self._chats.said)

    def __iter__(self) -> Iterator[list[int] | RenderedChat]:
        special = _spelled_tokens(self._tokenizer)
        usual = sum(token in special for token in self._ids([_PROBE])[0])
        spellings = [] if self._options else [str(self._tokenizer.convert_ids_to_tokens(token)) for token in special]
        while batch := list(islice(self._documents, BATCH_DOCUMENTS)):
            texts = [each for each in batch if isinstance(each, str)]
            encoded = iter(self._ids(texts) if texts else ())
            for document in batch:
                if isinstance(document, str):
                    ids = next(encoded)
                    self.spelling += sum(map(special.__contains__, ids)) > usual
                    whole = ids if self._end is None or ids[-1:] == [self._end] else [*ids, self._end]
                    self.tokens += len(whole)
                    self.characters += len(document)
                    yield whole
                    continue
                self.characters += document.characters
                if chat := self._chats.render(document):
                    self.spelling += any(one in turn["content"] for turn in document.turns for one in spellings)
                    self.tokens += len(chat.ids)
                    yield chat

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: no warning for documents longer than the model's window, as they are cut into windows
        found: Any = self._tokenizer(
            texts, truncation=False, verbose=False, return_attention_mask=False, **self._options
        )
        return found["input_ids"]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the end-of-text token. Raises `CalibrationError` if the tokenizer has none."""
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise CalibrationError(
            "the tokenizer has no end-of-text token, so documents cannot be kept apart",
            where=str(tokenizer.name_or_path),
            do="Set eos_token in its tokenizer_config.json.",
        )
    return end


def begin_token(tokenizer: PreTrainedTokenizerBase, wanted: bool | None = None) -> int | None:
    """Return the token that every window begins with, or None.

    By default it is beginning-of-text if the tokenizer adds that to texts, as determined by encoding a probe; `wanted`
    overrides this. Raises `CalibrationError` if it is wanted and the tokenizer has no such token.
    """
    begin: Any = tokenizer.bos_token_id
    if wanted is None:
        added: Any = tokenizer(_PROBE)["input_ids"]
        bare: Any = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        wanted = begin is not None and added[:1] == [begin] != bare[:1]
    if wanted and begin is None:
        raise CalibrationError(
            "the tokenizer has no beginning-of-text token",
            where="calibration.begin_token",
            got="true",
            do="Leave it out: windows then begin as the tokenizer's texts do.",
        )
    return begin if wanted else None


def chat_begin_token(tokenizer: PreTrainedTokenizerBase, wanted: bool | None = None) -> int | None:
    """Return the token that every window of conversations begins with, or None: that of texts or, unless `wanted` is
    false, that which only the chat template writes at the start. Raises like `begin_token`."""
    begin = begin_token(tokenizer, wanted)
    return begin if begin is not None or wanted is False else written_begin(tokenizer)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, wanted_begin: bool | None, *, plain_text: bool) -> None:
    """Raise `CalibrationError` if windows cannot be cut with this tokenizer as requested."""
    end_token(tokenizer)
    begin_token(tokenizer, wanted_begin)
    if plain_text:
        _check_plain_text(tokenizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the special tokens."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the vocabulary without special tokens, ascending."""
    return sorted(set(tokenizer.get_vocab().values()) - special_tokens(tokenizer))


def _spelled_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens that text yields only by spelling them: all but that for unknown characters."""
    begin, end, unknown = (
        cast("int | None", token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    )
    return special_tokens(tokenizer) - ({unknown} - {begin, end})


def _check_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `CalibrationError` if the tokenizer cannot encode the text of a special token as plain text.

    Some tokenizers not written in Rust cannot.
    """
    spelled = tokenizer.convert_ids_to_tokens(end_token(tokenizer))
    try:
        ids: Any = tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    except (TypeError, ValueError, NotImplementedError):
        ids = [end_token(tokenizer)]
    if end_token(tokenizer) in ids:
        raise CalibrationError(
            "this tokenizer cannot encode the text of a special token as plain text",
            where="calibration.plain_text",
            got="true",
            do="Leave it out, or remove such text from the corpora.",
        )
