"""A conversation: turns of text, normalized from the various input formats.

It is stored as one line of JSON, `{"turns": [{"role": …, "content": …}, …]}`, with `tools` if there are any. Its digest
is computed from that line, so conversations with equal content are one document, whatever format they came in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TURNS = 1000
TAG = b"crosscal conversation 1\n"
"""Prefix of the digested bytes, so that a text equal to a conversation's JSON is a different document."""

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **{role: role for role in ("system", "developer")},
}
_SPELLINGS = (("role", "content"), ("from", "value"))
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Further fields of a turn that are kept because templates read them; ids, times and ratings are dropped."""

Turn = dict[str, Any]


class NoConversation(ValueError):
    """Raised for input that is not a conversation. The message is the reason that rejects are counted by."""


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    """`role` (system, developer, user, assistant, tool), `content` (a string), and further fields read by templates."""

    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that may be called."""

    @property
    def characters(self) -> int:
        return len(self.plain)

    @property
    def plain(self) -> str:
        """The contents of the turns, separated by blank lines, without roles and tool calls."""
        return "\n\n".join(turn["content"] for turn in self.turns if turn["content"])

    def stored(self) -> str:
        said = {"turns": self.turns} | ({"tools": self.tools} if self.tools else {})
        return json.dumps(said, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def of_stored(cls, text: str) -> Conversation:
        said = json.loads(text)
        return cls(tuple(said["turns"]), tuple(said.get("tools", ())))


def conversation_of(turns: Any, tools: Any = None) -> Conversation:
    """Build a conversation from a list of turns in a common format, or from its JSON text.

    Turns are mappings with `role` and `content`, or with `from` and `value` (human, gpt); or one mapping of lists of
    equal length, as `datasets` stores a sequence. Content is a string or a list of text parts, which are joined by line
    ends. Tool calls are kept, with their arguments as objects. None values are dropped, because tables write them where
    a row lacks a field. Empty system and developer turns are dropped. Raises `NoConversation`, also for an empty user
    turn and for an empty assistant turn without tool calls.
    """
    listed = _listed(turns, "turns are not a list of objects")
    if len(listed) > MOST_TURNS:
        raise NoConversation(f"more than {MOST_TURNS} turns")
    found = [turn for turn in map(_turn, listed) if turn["content"] or turn["role"] not in ("system", "developer")]
    if not any(turn["role"] in ("user", "assistant") for turn in found):
        raise NoConversation("no turn of a user or an assistant")
    if not all(turn["content"] or "tool_calls" in turn or turn["role"] == "tool" for turn in found):
        raise NoConversation("a turn is empty")
    return Conversation(tuple(found), tuple(_listed(tools or [], "tools are not a list of objects")))


def exchange(questions: Iterable[str], answer: str, system: str = "") -> Conversation:
    """Build the conversation of an instruction record: the questions, joined by blank lines, and the answer.

    Raises `NoConversation`.
    """
    asked = "\n\n".join(question for question in questions if question.strip())
    turns = [{"role": "system", "content": system}] if system.strip() else []
    return conversation_of([*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}])


def _listed(value: Any, reason: str) -> list[dict[str, Any]]:
    value = _decoded(value)
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        rows = zip(*value.values(), strict=True) if len(lengths) == 1 else ()
        value = [dict(zip(value, row, strict=True)) for row in rows]
    if not isinstance(value, list):
        raise NoConversation(reason)
    value = [_decoded(each) for each in value]
    if not all(isinstance(each, dict) for each in value):
        raise NoConversation(reason)
    return [_without_nothing(each) for each in value]


def _turn(said: dict[str, Any]) -> Turn:
    role_key, content_key = next((pair for pair in _SPELLINGS if pair[0] in said), _SPELLINGS[0])
    role = said.get(role_key)
    if not isinstance(role, str):
        raise NoConversation("a turn has no role")
    if role.strip().lower() not in _ROLES:
        raise NoConversation("a turn has an unknown role")
    turn: Turn = {"role": _ROLES[role.strip().lower()], "content": _text(said.get(content_key))}
    turn |= {name: said[name] for name in _KEPT if isinstance(said.get(name), str) and said[name]}
    calls = said.get("tool_calls") or ([{"function": said["function_call"]}] if said.get("function_call") else [])
    if calls:
        turn["tool_calls"] = [_call(call) for call in _listed(calls, "tool calls are not a list of objects")]
    return turn


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content if content.strip() else ""
    if not isinstance(content, list):
        raise NoConversation("a turn has content other than text")
    return "\n".join(map(_part, content))


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else part
    if not isinstance(text, str):
        raise NoConversation("a turn has content other than text")
    return text


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Decode the arguments to an object: templates write them as JSON, and would quote a text twice."""
    function = call.get("function")
    if not isinstance(function, dict):
        return {**call, "arguments": _decoded(call["arguments"])} if "arguments" in call else call
    if "arguments" in function:
        function = {**function, "arguments": _decoded(function["arguments"])}
    return {"type": "function", **call, "function": function}


def _decoded(value: Any) -> Any:
    """Decode a text that is the JSON of a list or an object; return any other value unchanged."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nothing(each) for name, each in value.items() if each is not None}
    return [_without_nothing(each) for each in value] if isinstance(value, list) else value
