"""Method settings in a plan: the fields of a method's dataclass are plan fields, each an axis of a sweep."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from crosscal.compressors import COMPRESSORS, Sparsity

OF_A_MIXTURE = ("domain", "alpha", "mixture")
"""Fields of a recipe's step, besides its settings, that give it a mixture of its own."""
EMPTY = "an empty list leaves nothing to sweep; give a value or leave the field out"
Settings = tuple[tuple[str, Any], ...]


def checked_axes(methods: Iterable[str], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return every setting as a list of values, validated by the type of the method's field, with defaults added.

    Raises `PydanticCustomError` naming the setting: one that no method has, or a value of another type. Unknown methods
    are skipped here: `crosscal.variants` refuses them.
    """
    known = [method for method in methods if method in COMPRESSORS]
    if not known:
        return {name: as_axis(value) for name, value in given.items()}
    axes: dict[str, list[Any]] = {}
    for name, value in given.items():
        if value == []:
            raise PydanticCustomError("setting", "{setting}: {why}", {"setting": name, "why": EMPTY})
        owners = [method for method in known if name in _fields(method)]
        if not owners:
            raise PydanticCustomError(
                "unknown_setting", "{setting}: {why}", {"setting": name, "why": _why(name, known)}
            )
        axes[name] = [_checked(owners[0], name, each) for each in as_axis(value)]
    for name, default in _common_defaults(known).items():
        axes.setdefault(name, [default])
    return axes


def combinations(method: str, axes: Mapping[str, list[Any]]) -> Iterator[Settings]:
    """Yield the product of those axes that a method has, in the order of its fields."""
    fields = [name for name in _fields(method) if name in axes]
    for values in itertools.product(*(axes[name] for name in fields)):
        yield tuple(zip(fields, values, strict=True))


def described_methods() -> list[dict[str, Any]]:
    """Describe every method: name, effect (first sentence of its module), kind, needs, settings and arXiv numbers."""
    return [_described(name, method) for name, method in COMPRESSORS.items()]


def _described(name: str, method: Any) -> dict[str, Any]:
    text = " ".join((inspect.getmodule(method).__doc__ or "").split())  # pyright: ignore[reportOptionalMemberAccess]
    settings = {
        field.name: {
            "type": str(field.type).replace("Sparsity", 'fraction or "n:m"'),
            "needed": field.default is dataclasses.MISSING,
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in _fields(name).values()
    }
    return {
        "method": name,
        "does": re.split(r"(?<=\.) ", text, maxsplit=1)[0].partition(": ")[2] or text.partition(". ")[0],
        "kind": method.kind,
        "needs": sorted(method.needs),
        "settings": settings,
        "source": sorted(set(re.findall(r"arXiv (\d{4}\.\d{4,5})", text))),
    }


def needed(method: str) -> list[str]:
    """Return the settings without a default."""
    return [name for name, field in _fields(method).items() if field.default is dataclasses.MISSING]


def default_of(method: str, name: str) -> Any:
    return _fields(method)[name].default


def example_of(method: str, name: str) -> str:
    """Return an example value of a setting."""
    return {Sparsity: "0.5", int: "4"}.get(typing.get_type_hints(COMPRESSORS[method])[name], "…")


def as_axis(value: Any) -> list[Any]:
    """Return a list unchanged, any other value as a list of one. Raises `ValueError` for an empty list, which would
    remove the entry from the sweep."""
    if value == []:
        raise ValueError(EMPTY)
    return value if isinstance(value, list) else [value]


@functools.cache
def _fields(method: str) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(COMPRESSORS[method])}


@functools.cache
def _adapter(method: str, name: str) -> TypeAdapter[Any]:
    hint = typing.get_type_hints(COMPRESSORS[method])[name]
    return TypeAdapter(float | str if hint is Sparsity else hint)


def _checked(method: str, name: str, value: Any) -> Any:
    try:
        return _adapter(method, name).validate_python(value)
    except ValidationError as error:
        why = f"{error.errors()[0]['msg']} (got {value!r:.80})"
        raise PydanticCustomError("bad_setting", "{setting}: {why}", {"setting": name, "why": why}) from error


def _common_defaults(methods: list[str]) -> dict[str, Any]:
    """Return the defaults that all methods with the setting share; other defaults stay each method's own."""
    found: dict[str, list[Any]] = {}
    for method in methods:
        for name, field in _fields(method).items():
            found.setdefault(name, []).append(field.default)
    return {
        name: values[0]
        for name, values in found.items()
        if dataclasses.MISSING not in values and all(value == values[0] for value in values)
    }


def _why(name: str, methods: list[str]) -> str:
    settings = sorted({field for method in methods for field in _fields(method)})
    owners = [method for method in COMPRESSORS if name in _fields(method)]
    if owners and name not in settings:
        return f"{' and '.join(methods)} has no `{name}`; {', '.join(owners)} has"
    close = difflib.get_close_matches(name, [*settings, "method", "steps", *OF_A_MIXTURE], n=1)
    return "unknown field; " + (f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(settings)}")
