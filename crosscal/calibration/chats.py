"""Conversations as a model's own chat template renders them.

Rendering is that of transformers' `apply_chat_template`, in its sandbox, without a prompt to answer behind it. All of
a conversation counts, also what a template marks as generated. The template writes the special tokens, beginning-of-
text among them: none is added. Where it refuses a conversation with a system turn, what that turn says is put in front
of the first user turn; where it refuses that too, the conversation is left out and counted with the reason.
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
"""What templates that write today's date are told (Llama's own default): windows must not depend on the day."""

_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises that cannot render a conversation: on purpose, or over what it did not expect."""

REASON_CHARACTERS = 120


def template_settings(tokenizer: PreTrainedTokenizerBase) -> str:
    """What rendered tokens depend on besides tokenizer and conversation, digested. Never raises."""
    return digest_of([RULE, tokenizer.chat_template])


def check_template(tokenizer: PreTrainedTokenizerBase, corpus: str) -> None:
    """Raises `CalibrationError` where the conversations of a corpus cannot be rendered: there is no template."""
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
    """Beginning-of-text where the template writes it once, in front of all turns: of some it opens every turn."""
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
        """The tokens of each turn, where the template lets them be told apart: what it renders of the first turns
        alone is then what the whole begins with. Turns that it does not are not separated."""
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
    """Renders conversations, and counts what had to be done to them. With `plain_text` turns that spell a special
    token are read as the letters they consist of; what the template writes is read as special tokens all the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain_text: bool = False) -> None:
        self._tokenizer, self._plain_text = tokenizer, plain_text
        self.said: Counter[str] = Counter()
        """A sentence about some conversations → of how many it is true."""

    def render(self, conversation: Conversation) -> RenderedChat | None:
        """None where the template refuses it."""
        refusal: Exception | None = None
        for turns in (conversation.turns, without_system(conversation.turns)):
            try:
                ids = self.ids(turns, conversation.tools)
            except REFUSALS as error:
                refusal = refusal or error
                continue
            if refusal:
                self.said["system turns stand in the first user turn, as the template knows none"] += 1
            return RenderedChat(ids, self, turns, conversation.tools)
        reason = " ".join(f"{type(refusal).__name__}: {refusal}".split())[:REASON_CHARACTERS]
        self.said[f"left out, refused by the chat template ({reason})"] += 1
        return None

    def ids(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Raises what the template raises, and `ValueError` where there is none."""
        schemas: Any = list(tools) or None
        template = self._tokenizer.get_chat_template(None, schemas)
        found: Any = self._tokenizer.apply_chat_template(
            list(turns),
            tools=schemas,
            chat_template=_NOW.sub(lambda match: repr(TODAY.strftime(match[2])), template),
            return_dict=False,
            sanitize_control_tokens=self._plain_text,
            tokenizer_kwargs={"verbose": False},  # a conversation longer than the model's window is no mistake here
        )
        return found


def without_system(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """With what the first system turn says in front of the first user turn, a blank line between them."""
    if not turns or turns[0]["role"] not in ("system", "developer"):
        return tuple(turns)
    system, *others = turns
    at = next((place for place, turn in enumerate(others) if turn["role"] == "user"), None)
    if at is None:
        return tuple(turns)
    both = {**others[at], "content": f"{system['content']}\n\n{others[at]['content']}"}
    return (*others[:at], both, *others[at + 1 :])
