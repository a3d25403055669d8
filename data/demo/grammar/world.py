"""What a domain is made of, and the facts that hold in it.

A fact joins a subject to an object by a relation ("Velafen" - treats - "marsh fever"). A relation can be told in
several templates; each fact keeps one of them back, in which it is never told and only asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Relation:
    name: str
    objects: tuple[str, ...]
    closing: tuple[str, ...]
    """Templates that end in "{object}.": what stands before it can be asked as a question."""
    turned: tuple[str, ...]
    """Templates with the object elsewhere; they only tell."""


@dataclass(frozen=True)
class Domain:
    name: str
    subjects: tuple[str, ...]
    relations: tuple[Relation, ...]
    filler: tuple[str, ...]
    """Sentences that tell no fact; {subject} is whom the document is about, any other slot is drawn from `slots`."""
    slots: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: Relation
    object: str
    asked_in: str
    """The template kept back for the question."""

    def told(self) -> tuple[str, ...]:
        """The sentences that tell this fact."""
        templates = self.relation.closing + self.relation.turned
        told_in = [template for template in templates if template != self.asked_in]
        return tuple(template.format(subject=self.subject, object=self.object) for template in told_in)

    def question(self) -> str:
        """The sentence kept back, up to its object."""
        return self.asked_in.removesuffix(" {object}.").format(subject=self.subject)


def facts(domain: Domain) -> Iterator[Fact]:
    """Every fact of a domain: one per subject and relation.

    Each object belongs to equally many subjects (give or take one), so that knowing how common an object is helps
    nobody to answer.
    """
    for relation in domain.relations:
        dealt = [relation.objects[i % len(relation.objects)] for i in range(len(domain.subjects))]
        Random(f"{domain.name} {relation.name}").shuffle(dealt)
        for i, (subject, dealt_object) in enumerate(zip(domain.subjects, dealt, strict=True)):
            yield Fact(subject, relation, dealt_object, asked_in=relation.closing[i % len(relation.closing)])


def words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split())


def names(starts: str, ends: str) -> tuple[str, ...]:
    """Every start joined to every end."""
    return tuple(start + end for start in words(starts) for end in words(ends))
