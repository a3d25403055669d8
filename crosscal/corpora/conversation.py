"""A conversation: turns of text, in one form however they were written down.

Stored it is one line of JSON, `{"turns": [{"role": …, "content": …}, …]}` and `tools` where there are any, which its
digest is taken from: two that say the same are one document, whichever spelling they came in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TURNS = 1000
TAG = b"crosscal conversation 1\n"
"""In front of what is digested, so that a text which spells a conversation's JSON is another document."""

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **{role: role for role in ("system", "developer")},
}
_SPELLINGS = (("role", "content"), ("from", "value"))
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Of what else a turn may hold, what templates read; identifiers, times and ratings are left out."""

Turn = dict[str, Any]


class NoConversation(ValueError):
    """Why something is none: a reason that rejects are counted by."""


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    """`role` (system, developer, user, assistant, tool) and `content`, a string; what templates read besides."""

    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that may be called."""

    @property
    def characters(self) -> int:
        return len(self.plain)

    @property
    def plain(self) -> str:
        """What the turns say, a blank line between them: no roles, no calls of tools."""
        return "\n\n".join(turn["content"] for turn in self.turns if turn["content"])

    def stored(self) -> str:
        said = {"turns": self.turns} | ({"tools": self.tools} if self.tools else {})
        return json.dumps(said, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def of_stored(cls, text: str) -> Conversation:
        said = json.loads(text)
        return cls(tuple(said["turns"]), tuple(said.get("tools", ())))


def conversation_of(turns: Any, tools: Any = None) -> Conversation:
    """From a list of turns as people write them, or the JSON text of one. Raises `NoConversation`.

    Turns are mappings with `role` and `content`, or with `from` and `value` (human, gpt); or one mapping of two lists,
    as `datasets` stores a sequence. Content is a string or a list of parts, of which all must be text: they are joined
    by line ends. Calls of tools are kept, their arguments as objects. Whatever is None is left out, for tables write it
    where a row lacks what another has. A system turn that says nothing is left out; any other is no turn.
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
    """An instruction record: what is asked, its parts joined by a blank line, and the answer. Raises as above."""
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
        turn["tool_calls"] = [_call(call) for call in _listed(calls, "calls of tools are not a list of objects")]
    return turn


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content if content.strip() else ""
    if not isinstance(content, list):
        raise NoConversation("a turn holds something other than text")
    return "\n".join(map(_part, content))


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else part
    if not isinstance(text, str):
        raise NoConversation("a turn holds something other than text")
    return text


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object, which is what templates write as JSON: as text they would be quoted twice."""
    function = call.get("function")
    if not isinstance(function, dict):
        return {**call, "arguments": _decoded(call["arguments"])} if "arguments" in call else call
    if "arguments" in function:
        function = {**function, "arguments": _decoded(function["arguments"])}
    return {"type": "function", **call, "function": function}


def _decoded(value: Any) -> Any:
    """Of a text that is the JSON of a list or an object, that; else the value as it is."""
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
