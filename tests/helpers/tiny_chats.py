"""Conversations of a few words, and chat templates like those of real models over the tiny vocabulary."""

from __future__ import annotations

import random
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_text import SENTENCES, tiny_tokenizer

WORDS = " ".join(SENTENCES).split()
_TURNS = "{% for m in messages %}<pad>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
TEMPLATES = {
    "turns": _TURNS,
    "begin-once": "{{ bos_token }}" + _TURNS,
    "begin-every-turn": "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}",
    "own-system": "{% if messages[0]['role'] != 'system' %}<pad>system\nBe kind.</s>\n{% endif %}" + _TURNS,
    "no-system": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + _TURNS,
    "generation": "{{ bos_token }}{% for m in messages %}<pad>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
    "tools": "{% if tools %}<pad>tools\n{{ tools | tojson }}</s>\n{% endif %}"
    "{% for m in messages %}<pad>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.get('tool_calls', []) %}{{ call['function'] | tojson }}{% endfor %}</s>\n{% endfor %}",
}


def chat_tokenizer(template: str | None, *, begin: bool = True) -> PreTrainedTokenizerFast:
    """Tiny tokenizer with a template, given by its name in `TEMPLATES` or as text. `begin`: texts start with `<s>`."""
    tokenizer = tiny_tokenizer(begin=begin)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = TEMPLATES.get(template, template) if template else None
    return tokenizer


def chats(count: int, seed: int = 0, *, longest: int = 12) -> list[list[dict[str, Any]]]:
    """Conversations of one to three exchanges, every third with a system turn; every turn starts with their number."""
    chance = random.Random(seed)

    def words() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(4, longest)))

    found = []
    for number in range(count):
        system = [{"role": "system", "content": f"{number} {words()}"}] if number % 3 == 0 else []
        turns = [
            {"role": role, "content": f"{number} {words()}"}
            for _ in range(chance.randint(1, 3))
            for role in ("user", "assistant")
        ]
        found.append([*system, *turns])
    return found
