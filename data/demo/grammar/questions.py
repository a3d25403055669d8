"""Questions: a fact in the one template that never told it, with four objects of its relation to choose from."""

from random import Random

from grammar.world import Domain, Fact, facts

CHOICES = 4


def questions(domain: Domain, count: int, random: Random) -> list[dict]:
    """`count` rows {"question", "choices", "answer"}, equally many per relation and per answer position.

    `question` is the beginning of a sentence and each choice an ending, to be joined by one space.
    """
    per_relation = count // len(domain.relations)
    asked = [
        fact
        for relation in domain.relations
        for fact in random.sample([fact for fact in facts(domain) if fact.relation is relation], per_relation)
    ]
    return [_question(fact, i % CHOICES, random) for i, fact in enumerate(asked)]


def _question(fact: Fact, answer: int, random: Random) -> dict:
    others = [choice for choice in fact.relation.objects if choice != fact.object]
    choices = random.sample(others, CHOICES - 1)
    choices.insert(answer, fact.object)
    return {"question": fact.question(), "choices": choices, "answer": answer}
