"""Forms of a record: the columns that hold its document (a text, the turns of a conversation, question and answer).

If a plan does not name the column, the first form is used whose columns exist and are not empty:

    text
    messages, conversations or conversation      turns (see `crosscal.corpora.conversation`), or the JSON of turns
    instruction (input, context), output         the question is the first three, joined by blank lines
    instruction (input, context), response
    prompt, response                             either may be a list of turns
    prompt, completion

A question may come with a column `system` or `system_prompt`, turns with a column `tools`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from crosscal.corpora.conversation import Conversation, NoConversation, conversation_of, exchange
from crosscal.corpora.limits import DocumentLimits
from crosscal.corpora.records import TEXT, Document, Reject, judge, judge_conversation, no_column
from crosscal.files import excerpt

Form = tuple[str, ...]
"""The columns of a document: one column, or those of a question followed by that of its answer."""

TURNS = ("messages", "conversations", "conversation")
FORMS: tuple[Form, ...] = (
    (TEXT,),
    *((name,) for name in TURNS),
    *(("instruction", "input", "context", answer) for answer in ("output", "response")),
    *(("prompt", answer) for answer in ("response", "completion")),
)
_OPTIONAL = {"input", "context"}
_SYSTEM = ("system", "system_prompt")
_TOOLS = "tools"


def columns_wanted(names: Iterable[str], text: str) -> list[str]:
    """Return the columns of a table that its documents may be built from; empty if the table has no known form."""
    found = _found(text, set(names := list(names)))
    beside = () if found in ([], [(TEXT,)]) else (*_SYSTEM, _TOOLS)
    wanted = {name for form in found for name in form}.union(beside)
    return list(dict.fromkeys(name for name in names if name in wanted))


def candidate(
    record: Mapping[str, Any], text: str, source: str, line: int, limits: DocumentLimits
) -> Document | Reject:
    """Return the document of one record, or a reject. `text` names its column; with `TEXT`, the form is detected."""
    there = _found(text, record.keys())
    if not there:
        return no_column(source, line, text, record)
    form = next((each for each in there if all(_holds(record[name]) for name in _needed(each))), there[0])
    try:
        found = _read(record, form, text)
        if not isinstance(found, Conversation):
            return judge(found, source, line, limits, form=form[0])
        said = ", ".join(name for name in form if name in record)
        return judge_conversation(found, source, line, limits, form=said)
    except NoConversation as error:
        return Reject(source, line, str(error), excerpt(reprlib.repr(record[form[-1]])))
    except RecursionError:
        return Reject(source, line, "nested too deeply")


def _found(text: str, names: Collection[str]) -> list[Form]:
    asked = FORMS if text == TEXT else ((text,),)
    return [form for form in asked if _needed(form) <= set(names)]


def _needed(form: Form) -> set[str]:
    return set(form) if len(form) == 1 else set(form) - _OPTIONAL


def _holds(value: Any) -> bool:
    return value is not None and value != "" and value != []


def _read(record: Mapping[str, Any], form: Form, text: str) -> Conversation | object:
    """Return a conversation, or the value of the text column, which `judge` checks later."""
    if len(form) > 1:
        return _exchange(record, form)
    name = next(iter(form))
    value, tools = record[name], record.get(_TOOLS)
    if isinstance(value, list | dict):
        return conversation_of(value, tools)
    if name == text:  # a named column holds texts or the JSON of turns; `text` holds only texts
        return _turns_spelled(value, tools) if isinstance(value, str) and text != TEXT else value
    return conversation_of(value, tools)


def _turns_spelled(value: str, tools: Any) -> Conversation | str:
    try:
        return conversation_of(value, tools) if value.lstrip()[:1] == "[" else value
    except NoConversation:
        return value


def _exchange(record: Mapping[str, Any], form: Form) -> Conversation:
    *asked, answer = (record.get(name) for name in form)
    system = next((record[name] for name in _SYSTEM if isinstance(record.get(name), str)), "")
    if isinstance(asked[0], list) or isinstance(answer, list):
        return conversation_of([*_turns(asked[0], "user"), *_turns(answer, "assistant")], record.get(_TOOLS))
    asked = [part for part in asked if part is not None]
    if not all(isinstance(part, str) for part in (*asked, answer)):
        raise NoConversation("text is not a string")
    return exchange(asked, str(answer), system)


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]
