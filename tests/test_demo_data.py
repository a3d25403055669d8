"""The bundled demo: files match their generator, questions have no shortcuts, the model knows the answers."""

import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[1] / "data" / "demo"
sys.path.insert(0, str(DEMO))  # the demo's scripts are not a package and run from their own folder

from grammar.world import facts  # noqa: E402
from make_corpora import DOCUMENTS, DOMAINS, files, read  # noqa: E402
from measure_model import accuracy, perplexity, questions, stream, texts  # noqa: E402

NAMES = [domain.name for domain in DOMAINS]
SPLITS = ("train", "validation", "test")
GUESSING = 0.4  # chance is 0.25; four standard errors of 120 questions above it

PERPLEXITY_BOUND = {"general": 2.5, "biomedical": 2.4, "legal": 2.2}
ACCURACY_BOUND = 0.95


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


def test_files_are_what_the_grammar_writes():
    written = files()
    kept = {path.relative_to(DEMO) for folder in ("corpora", "tasks") for path in (DEMO / folder).rglob("*.jsonl*")}
    assert kept == set(written)
    for path, text in written.items():
        assert read(DEMO / path) == text, path


def test_digests_cover_every_file_and_agree():
    lines = (DEMO / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    kept = [path for folder in ("corpora", "tasks", "model") for path in (DEMO / folder).rglob("*") if path.is_file()]
    assert listed == {path.relative_to(DEMO).as_posix(): sha256(path.read_bytes()).hexdigest() for path in kept}


def test_no_document_stands_in_two_places():
    documents = Counter(text for name in NAMES for split in SPLITS for text in texts(name, split))
    assert documents.total() == sum(sum(counts.values()) for counts in DOCUMENTS.values())
    assert set(documents.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_of_a_readable_length(name):
    words = [len(text.split()) for split in SPLITS for text in texts(name, split)]
    assert min(words) >= 60
    assert max(words) <= 200


@pytest.mark.parametrize("domain", DOMAINS, ids=NAMES)
def test_every_fact_is_told_often_and_never_in_the_words_of_its_question(domain):
    train = "\n".join(texts(domain.name, "train"))
    everywhere = "\n".join(text for split in SPLITS for text in texts(domain.name, split))
    for fact in facts(domain):
        assert sum(train.count(sentence) for sentence in fact.told()) >= 3, fact
        assert f"{fact.question()} " not in everywhere, fact


@pytest.mark.parametrize("domain", DOMAINS, ids=NAMES)
def test_the_answer_is_the_fact(domain):
    asked = {fact.question(): fact for fact in facts(domain)}
    for row in questions(domain.name):
        fact = asked[row["question"]]
        assert row["choices"][row["answer"]] == fact.object
        assert len(set(row["choices"])) == 4
        assert set(row["choices"]) <= set(fact.relation.objects)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_spread_evenly_over_positions(name):
    rows = questions(name)
    assert Counter(row["answer"] for row in rows) == dict.fromkeys(range(4), len(rows) // 4)
    assert len({row["question"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_questions_have_no_shortcuts(name):
    """Neither the length of a choice nor its frequency in training text reveals the answer."""
    train = "\n".join(texts(name, "train"))
    clues = {"longest": len, "shortest": lambda choice: -len(choice), "most often read": train.count}
    rows = questions(name)
    for clue, score in clues.items():
        right = [max(row["choices"], key=score) == row["choices"][row["answer"]] for row in rows]
        assert sum(right) / len(rows) < GUESSING, clue


def test_tokenizer_begins_a_text_and_gives_it_back(tokenizer):
    text = texts("legal", "test")[0]
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text
    assert tokenizer("Ada")["input_ids"][1:] == tokenizer("Here is Ada")["input_ids"][-1:]


def test_model_suits_groups_of_128_and_a_small_repository(model):
    config = model.config
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert sum(path.stat().st_size for path in (DEMO / "model").iterdir()) < 4e6
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_model_reads_the_test_documents_well(model, tokenizer, name):
    assert perplexity(model, stream(tokenizer, texts(name, "test")[:40])) < PERPLEXITY_BOUND[name]


@pytest.mark.parametrize("name", NAMES)
def test_model_knows_the_facts(model, tokenizer, name):
    assert accuracy(model, tokenizer, questions(name)[::3]) >= ACCURACY_BOUND
