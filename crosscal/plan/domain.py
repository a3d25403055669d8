"""Plan templates for landed domains: `$domain`, in keys and in strings, stands for the domain's name."""

from __future__ import annotations

import re
from typing import Any

from crosscal.errors import PlanError

WORD = "$domain"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def with_domain(data: dict[str, Any], domain: str | None, where: str) -> dict[str, Any]:
    """Return the plan's mapping with the domain filled in. A plan without `$domain` accepts no domain.

    The name is validated before it is used: it may come from an event. Raises `PlanError`.
    """
    is_template = _mentions(data)
    if domain is None:
        if is_template:
            raise PlanError("this plan is for a landed domain", where=where, do="Give --domain NAME.")
        return data
    if not _NAME.fullmatch(domain):
        raise PlanError(
            "not a valid name of a domain",
            where=where,
            got=repr(domain)[:100],
            do="Use up to 64 lower-case letters, digits, '.', '_' and '-', the first a letter or digit.",
        )
    if not is_template:
        raise PlanError(
            "this plan has no place for a domain", where=where, got=domain, do=f"Write {WORD} where its name belongs."
        )
    return _filled(data, domain, where)


def _mentions(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_mentions(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(_mentions, value))
    return isinstance(value, str) and WORD in value


def _filled(value: Any, domain: str, where: str) -> Any:
    if isinstance(value, list):
        return [_filled(item, domain, where) for item in value]
    if isinstance(value, dict):
        filled = {_filled(key, domain, where): _filled(item, domain, where) for key, item in value.items()}
        if len(filled) < len(value):
            raise PlanError("the plan has an entry of this domain's name already", where=where, got=domain)
        return filled
    return value.replace(WORD, domain) if isinstance(value, str) else value
