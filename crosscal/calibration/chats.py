"""Conversations rendered by a model's own chat template.

Rendering uses transformers' `apply_chat_template`, in its sandbox, without a generation prompt. All tokens of a
conversation count, also those that a template marks as generated. The template writes all special tokens, including
beginning-of-text; none is added. If it refuses a conversation with a system turn, the content of that turn is moved to
the front of the first user turn. If it refuses that too, the conversation is skipped and counted with the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import jinja2

from crosscal.corpora.conversation import Conversation, Turn
from crosscal.errors import CalibrationError
from crosscal.store import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULE = 1
TODAY = date(2024, 7, 26)
"""Date given to templates that write today's date (Llama's own default): windows must not depend on the day."""

_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions of a template that cannot render a conversation: raised on purpose, or by unexpected input."""

REASON_CHARACTERS = 120


def template_settings(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what rendered tokens depend on besides tokenizer and conversation. Never raises."""
    return digest_of([RULE, tokenizer.chat_template])


def check_template(tokenizer: PreTrainedTokenizerBase, corpus: str) -> None:
    """Raise `CalibrationError` if the tokenizer has no chat template to render the conversations of a corpus with."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise CalibrationError(
            "this corpus holds conversations, and the model's tokenizer has no chat template to render them with",
            where=f"corpora.{corpus}",
            got=str(tokenizer.name_or_path),
            do="Set `chat: text` there to read the turns as plain text, or save the model's chat_template.jinja beside "
            "its tokenizer.",
        ) from error


def written_begin(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return beginning-of-text if the template writes it exactly once, before all turns (some write it before every
    turn); None otherwise."""
    bos: Any = tokenizer.bos_token_id
    try:
        ids = ChatReader(tokenizer).ids(_PROBE)
    except REFUSALS:
        return None
    return bos if bos is not None and ids[:1] == [bos] and ids.count(bos) == 1 else None


@dataclass(frozen=True)
class RenderedChat:
    ids: list[int]
    reader: ChatReader
    turns: Sequence[Turn]
    tools: Sequence[dict[str, Any]]

    def by_turn(self) -> list[list[int]]:
        """Return the tokens turn by turn. A turn ends where the rendering of the turns up to it is a prefix of the
        whole rendering; turns without such an end are not separated."""
        found, ends = len(self.ids), [0]
        for count in range(1, len(self.turns)):
            try:
                ids = self.reader.ids(self.turns[:count], self.tools)
            except REFUSALS:
                continue
            if ends[-1] < len(ids) < found and self.ids[: len(ids)] == ids:
                ends.append(len(ids))
        return [self.ids[begin:end] for begin, end in zip(ends, [*ends[1:], found], strict=True)]


class ChatReader:
    """Renders conversations, and counts those that were changed or refused. With `plain_text`, turns that spell a
    special token are tokenized as ordinary text; special tokens written by the template stay special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False) -> None:
        self._tokenizer, self._plain_text = tokenizer, plain_text
        self.said: Counter[str] = Counter()
        """Statement about some conversations → number of conversations it applies to."""

    def render(self, conversation: Conversation) -> RenderedChat | None:
        """Render a conversation; None if the template refuses it."""
        refusal: Exception | None = None
        for turns in (conversation.turns, without_system(conversation.turns)):
            try:
                ids = self.ids(turns, conversation.tools)
            except REFUSALS as error:
                refusal = refusal or error
                continue
            if refusal:
                self.said["system turns merged into the first user turn, since the template has no system role"] += 1
            return RenderedChat(ids, self, turns, conversation.tools)
        reason = " ".join(f"{type(refusal).__name__}: {refusal}".split())[:REASON_CHARACTERS]
        self.said[f"left out, refused by the chat template ({reason})"] += 1
        return None

    def ids(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the rendered token ids. Raises what the template raises, and `ValueError` if there is no template."""
        schemas: Any = list(tools) or None
        template = self._tokenizer.get_chat_template(None, schemas)
        found: Any = self._tokenizer.apply_chat_template(
            list(turns),
            tools=schemas,
            chat_template=_NOW.sub(lambda match: repr(TODAY.strftime(match[2])), template),
            return_dict=False,
            sanitize_control_tokens=self._plain_text,
            tokenizer_kwargs={"verbose": False},  # no warning for conversations longer than the model's window
        )
        return found


def without_system(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Move the content of a leading system turn to the front of the first user turn, separated by a blank line."""
    if not turns or turns[0]["role"] not in ("system", "developer"):
        return tuple(turns)
    system, *others = turns
    at = next((place for place, turn in enumerate(others) if turn["role"] == "user"), None)
    if at is None:
        return tuple(turns)
    both = {**others[at], "content": f"{system['content']}\n\n{others[at]['content']}"}
    return (*others[:at], both, *others[at + 1 :])
