"""Every error that crosscal raises on purpose. Its parts: what happened, where, the value found, the remedy.

CrosscalError             exit code 1
├── UsageError            exit code 2: the request itself is wrong
│   └── PlanError         a field of the plan
├── CorpusError           documents: unreadable, unusable, too few
│   └── NoColumn          records without the text column that was asked for
├── CalibrationError      windows cannot be drawn or generated
│   └── TooLittleText     documents do not fill one window yet; an EvaluationError as well
├── ModelError            a checkpoint that cannot be read
│   └── UnsupportedModel  a module the walker does not know how to handle
├── StatisticsError       statistics that cannot be solved from
│   ├── EmptyStatistics
│   ├── NotFinite
│   └── NotPositiveDefinite
├── StoreError            the artifact store
│   ├── CorruptArtifact
│   ├── MissingArtifact
│   ├── StoreConflict
│   └── StoreFull
└── EvaluationError
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Self


class CrosscalError(Exception):
    """A failure with a remedy. The command line prints it as one message and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: str = "", do: str = "") -> None:
        self.what, self.where, self.got, self.do = what, where, got, do
        super().__init__(self._message())

    def _message(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.got:
            head += f" (got {self.got})"
        return f"{head}. {self.do}" if self.do else head

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the same error with `names` replaced by names that users know, e.g. a digest by a corpus name."""

        def told(text: str) -> str:
            return functools.reduce(lambda so_far, name: so_far.replace(name, names[name]), names, text)

        return type(self)(told(self.what), where=told(self.where), got=told(self.got), do=told(self.do))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled between processes; the default would pass the class only the message.
        return _rebuild, (type(self), self.what, self.where, self.got, self.do)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown name: the closest known name, and all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean `{close[0]}`? " if close else "") + f"There are: {', '.join(known) or 'none yet'}."


def _rebuild(kind: type[CrosscalError], what: str, where: str, got: str, do: str) -> CrosscalError:
    return kind(what, where=where, got=got, do=do)


class UsageError(CrosscalError):
    exit_code = 2


class PlanError(UsageError):
    pass


class CorpusError(CrosscalError):
    pass


class NoColumn(CorpusError):
    pass


class CalibrationError(CrosscalError):
    pass


class ModelError(CrosscalError):
    pass


class UnsupportedModel(ModelError):
    pass


class StatisticsError(CrosscalError):
    pass


class EmptyStatistics(StatisticsError):
    pass


class NotFinite(StatisticsError):
    pass


class NotPositiveDefinite(StatisticsError):
    pass


class StoreError(CrosscalError):
    pass


class CorruptArtifact(StoreError):
    pass


class MissingArtifact(StoreError):
    pass


class StoreConflict(StoreError):
    pass


class StoreFull(StoreError):
    pass


class EvaluationError(CrosscalError):
    pass


class TooLittleText(CalibrationError, EvaluationError):
    pass
