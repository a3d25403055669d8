"""Documents: a few subjects, facts told about each, ordinary sentences in between."""

import re
from random import Random

from grammar.world import Domain, Fact, facts

SUBJECTS_PER_DOCUMENT = 2
FACTS_PER_SUBJECT = (3, 4)
FILLER_PER_SUBJECT = (2, 4)


class Storyteller:
    """Writes documents of one domain, one random draw after another."""

    def __init__(self, domain: Domain, random: Random):
        self.domain = domain
        self.random = random
        self.known: dict[str, list[Fact]] = {subject: [] for subject in domain.subjects}
        for fact in facts(domain):
            self.known[fact.subject].append(fact)

    def document(self) -> str:
        subjects = self.random.sample(self.domain.subjects, SUBJECTS_PER_DOCUMENT)
        return " ".join(sentence for subject in subjects for sentence in self._paragraph(subject))

    def _paragraph(self, subject: str) -> list[str]:
        chosen = self.random.sample(self.known[subject], self.random.randint(*FACTS_PER_SUBJECT))
        sentences = [self.random.choice(fact.told()) for fact in chosen]
        sentences += [self._filler(subject) for _ in range(self.random.randint(*FILLER_PER_SUBJECT))]
        self.random.shuffle(sentences)
        return sentences

    def _filler(self, subject: str) -> str:
        def drawn(slot: re.Match[str]) -> str:
            return subject if slot[1] == "subject" else self.random.choice(self.domain.slots[slot[1]])

        sentence = re.sub(r"\{(\w+)\}", drawn, self.random.choice(self.domain.filler))
        return sentence[0].upper() + sentence[1:]
