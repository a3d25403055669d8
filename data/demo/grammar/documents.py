"""Documents: a few subjects, facts told about each, ordinary sentences in between."""

import re
from collections import defaultdict
from collections.abc import Iterator
from random import Random

from grammar.world import Domain, Fact, facts

SUBJECTS_PER_DOCUMENT = 2
FACTS_PER_SUBJECT = (3, 4)
FILLER_PER_SUBJECT = (2, 4)


def documents(domain: Domain, random: Random) -> Iterator[str]:
    """Documents of a domain without end."""
    known: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts(domain):
        known[fact.subject].append(fact)
    while True:
        subjects = random.sample(domain.subjects, SUBJECTS_PER_DOCUMENT)
        yield " ".join(sentence for subject in subjects for sentence in _paragraph(domain, known[subject], random))


def _paragraph(domain: Domain, known: list[Fact], random: Random) -> list[str]:
    """Some of what is known about one subject, each fact told once, and filler, in any order."""
    told = random.sample(known, random.randint(*FACTS_PER_SUBJECT))
    sentences = [random.choice(fact.told()) for fact in told]
    sentences += [_filler(domain, known[0].subject, random) for _ in range(random.randint(*FILLER_PER_SUBJECT))]
    random.shuffle(sentences)
    return sentences


def _filler(domain: Domain, subject: str, random: Random) -> str:
    def drawn(slot: re.Match[str]) -> str:
        return subject if slot[1] == "subject" else random.choice(domain.slots[slot[1]])

    sentence = re.sub(r"\{(\w+)\}", drawn, random.choice(domain.filler))
    return sentence[0].upper() + sentence[1:]
