"""The published model of a domain: ref `published/<domain>`. Each version is one move of the pointer, immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crosscal.errors import UsageError
from crosscal.store import Store


@dataclass(frozen=True)
class Pointer:
    """The pointer after one move."""

    domain: str
    number: int
    facts: dict[str, Any]
    """`model` (key), `variant`, `corpus_version`, `perplexity` of both models, `run_id`, `run_dir`, `plan`, `at`; and
    `restored`, the number of an earlier move, if the pointer was rolled back to that move."""

    @property
    def model(self) -> str:
        return self.facts["model"]

    @property
    def corpus_version(self) -> int:
        return self.facts["corpus_version"]

    @property
    def origin(self) -> int:
        """Number of the move that published this model, before any rollback to it."""
        return self.facts.get("restored", self.number)


class Published:
    """The pointers in a store."""

    def __init__(self, store: Store) -> None:
        self.refs = store.refs

    def domains(self) -> list[str]:
        return [name.removeprefix("published/") for name in self.refs.names("published")]

    def current(self, domain: str) -> Pointer | None:
        number, facts = self.refs.read(_name(domain))
        return None if facts is None else Pointer(domain, number, facts)

    def history(self, domain: str) -> list[Pointer]:
        """Return every move, oldest first."""
        return [self._move(domain, number) for number in self.refs.versions(_name(domain))]

    def move(self, domain: str, from_: Pointer | None, facts: dict[str, Any]) -> Pointer:
        """Point to another model. Raises `StoreConflict` if the pointer moved since `from_` was read."""
        number = self.refs.append(_name(domain), from_.number if from_ else 0, facts)
        return Pointer(domain, number, facts)

    def before(self, domain: str) -> Pointer:
        """Return the move before the one that published the current model. Raises `UsageError` if there is none."""
        current = self._any(domain)
        if current.origin == 1:
            raise UsageError("no model was published before this one", where=domain, got=f"move {current.number}")
        return self._move(domain, current.origin - 1)

    def earlier(self, domain: str, number: int) -> Pointer:
        """Return any move, even if rolled back. Raises `UsageError` if there is none, or it is to the current model."""
        current = self._any(domain)
        if not 1 <= number <= current.number:
            do = f"`crosscal publish {domain}` lists them: 1 to {current.number}."
            raise UsageError("no such move", where=domain, got=str(number), do=do)
        target = self._move(domain, number)
        if target.model == current.model:
            raise UsageError("this is the model that is published", where=domain, got=f"move {number}")
        return target

    def restore(self, target: Pointer, at: str) -> Pointer:
        """Point to the model of an earlier move again: a user's action, which can be undone in the same way."""
        current = self._any(target.domain)
        facts = {**target.facts, "restored": target.origin, "rolled_back_from": current.number, "at": at}
        return self.move(target.domain, current, facts)

    def roll_back(self, domain: str, at: str) -> Pointer:
        """Point to the previous model again. Raises `UsageError` if there is none."""
        return self.restore(self.before(domain), at)

    def remove(self, domain: str) -> None:
        """Remove the pointer and its history. The models it named are then no longer protected from `Store.sweep`."""
        self.refs.remove(_name(domain))

    def _any(self, domain: str) -> Pointer:
        current = self.current(domain)
        if current is None:
            raise UsageError("nothing is published for this domain", got=domain)
        return current

    def _move(self, domain: str, number: int) -> Pointer:
        _, facts = self.refs.read(_name(domain), number)
        assert facts is not None
        return Pointer(domain, number, facts)


def _name(domain: str) -> str:
    return f"published/{domain}"
