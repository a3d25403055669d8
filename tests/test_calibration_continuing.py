"""Generated continuations of documents: choice of the documents, sampled tokens, texts kept."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crosscal.calibration import Seeds, TemperatureSchedule, WindowRequest, continued_windows
from crosscal.calibration.continuing import kept
from crosscal.calibration.sampling import GeneratedText, SequenceWriter
from crosscal.corpora import Corpus, documents, ingest
from crosscal.errors import CalibrationError
from crosscal.store import Store
from tests.helpers.plain_sampling import uncached
from tests.helpers.tiny_chats import chat_tokenizer, chats
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer

MODEL, TOKENIZER = "a" * 64, "b" * 64
REQUEST = WindowRequest(6, 32)
PREFIX = 9
SEED = 4


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def exact_model():
    """Computes in float64: with and without a cache, probabilities differ too little to change a token."""
    return tiny_llama().double()


@pytest.fixture
def corpus(store: Store, tmp_path: Path) -> Corpus:
    return land(store, tmp_path, "legal", 30)


def land(store: Store, folder: Path, name: str, count: int, *, sentences: int = 3, seed: int = 0) -> Corpus:
    chance, place = random.Random(seed), folder / f"{name}-{seed}.jsonl"
    texts = [f"{seed} {number} " + " ".join(chance.choices(SENTENCES, k=sentences)) for number in range(count)]
    place.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ingest(store, name, [str(place)]).corpus


def seeds_of(corpus: Corpus, **changes) -> Seeds:
    return dataclasses.replace(Seeds(corpus.name, corpus.shards, PREFIX), **changes)


def written(store: Store, model, seeds: Seeds, request: WindowRequest = REQUEST, **settings):
    settings = {"batch": 4, **settings}
    return continued_windows(store, model, MODEL, tiny_tokenizer(), TOKENIZER, request, seeds, **settings)


def texts_of(store: Store) -> list[GeneratedText]:
    """Return all generated texts in the order of their numbers."""
    batches = sorted(store.list("generations"), key=lambda artifact: artifact.provenance["numbers"])
    return [GeneratedText(**text) for batch in batches for text in json.loads(store.read_bytes(batch, "texts.json"))]


def beginnings(store: Store, corpus: Corpus, split: str) -> set[tuple[int, ...]]:
    tokenizer = tiny_tokenizer()
    texts = (text for shard in corpus.shards for text in documents(store, shard, split))
    return {tuple(tokenizer(text)["input_ids"][: PREFIX + 1]) for text in texts}


def test_rows_are_continued_as_whole_texts_would_be(exact_model) -> None:
    prompt_BP = torch.randint(3, 400, (16, 7), generator=torch.Generator().manual_seed(0))
    plain = SequenceWriter(exact_model, 0, 1, 40, TemperatureSchedule(), None, "cpu")
    numbers = range(10, 26)
    rows = [text.tokens for text in plain.continued(prompt_BP, numbers, SEED)]
    common = int(torch.tensor([token for row in rows for token in row[12:]]).bincount().argmax())
    writer = dataclasses.replace(plain, end=common)  # so that rows end at different positions
    found = writer.continued(prompt_BP, numbers, SEED, judged=True)
    prompts = prompt_BP.tolist()
    assert [text.tokens for text in found] == [
        uncached(exact_model, writer, number, SEED, prompt) for number, prompt in zip(numbers, prompts, strict=True)
    ]
    assert len({len(text.tokens) for text in found}) > 2
    for text in found:
        tokens_T = torch.tensor(text.tokens)
        with torch.inference_mode():
            expected = F.cross_entropy(exact_model(input_ids=tokens_T[None]).logits[0, :-1], tokens_T[1:]).item()
        assert text.nll == pytest.approx(expected, rel=1e-5)


def test_texts_begin_as_training_documents_and_held_out_ones_as_validation_documents(
    store: Store, model, corpus: Corpus
) -> None:
    written(store, model, seeds_of(corpus))
    begun = {tuple(text.tokens[: PREFIX + 1]) for text in texts_of(store)}
    assert begun <= beginnings(store, corpus, "train")
    assert len(begun) == len(texts_of(store))  # no document is used twice while unused ones remain
    other = Store(store.location + "-held-out")
    for shard in corpus.shards:  # held-out texts: this store contains no training documents
        with other.publish("corpora", shard.key, {}) as folder:
            kept_file = store.path(store.get("corpora", shard.key), "validation.arrow")
            (folder / "validation.arrow").write_bytes(kept_file.read_bytes())
    written(other, model, seeds_of(corpus), dataclasses.replace(REQUEST, split="validation"))
    held_out = {tuple(text.tokens[: PREFIX + 1]) for text in texts_of(other)}
    assert held_out <= beginnings(store, corpus, "validation")
    assert not held_out & begun


def test_windows_are_the_texts_that_are_kept_joined(store: Store, model, corpus: Corpus) -> None:
    found = written(store, model, seeds_of(corpus, drop=0.3))
    texts = texts_of(store)
    worst = sorted((text.nll for text in texts), reverse=True)[: int(0.3 * len(texts))]
    assert worst
    stream = [token for text in texts if text.nll not in worst for token in text.tokens]
    windows = []
    while len(windows) < REQUEST.windows:  # each starts with exactly one begin token
        stream = stream[1:] if stream[0] == 0 else stream
        windows, stream = [*windows, [0, *stream[:31]]], stream[31:]
    assert found.tokens_SL.tolist() == windows


def test_what_is_dropped_is_what_the_published_filter_drops() -> None:
    chance = np.random.default_rng(0)
    for count in (5, 10, 37, 200):
        nlls = chance.normal(4, 1, count)
        threshold = np.percentile(np.exp(nlls), 80)
        texts = [GeneratedText([number], float(nll)) for number, nll in enumerate(nlls)]
        published = [text for text in texts if np.exp(text.nll) < threshold]
        assert abs(len(kept(texts, 0.2)) - len(published)) <= 1
        assert kept(texts, 0.2)[: len(published)] == published or count % 5
        assert kept(texts, 0.0) == texts
    assert [text.tokens for text in kept([GeneratedText([n], 1.0) for n in range(5)], 0.4)] == [[0], [1], [2]]


def test_the_same_texts_are_found_again_and_other_settings_write_others(
    store: Store, model, corpus: Corpus, tmp_path: Path
) -> None:
    first = written(store, model, seeds_of(corpus))
    assert torch.equal(written(store, None, seeds_of(corpus)).tokens_SL, first.tokens_SL)
    assert torch.equal(written(Store(tmp_path / "home"), model, seeds_of(corpus)).tokens_SL, first.tokens_SL)
    grown = land(store, tmp_path, "legal", 10, seed=1)
    assert len(grown.shards) == 2
    others = [
        written(store, model, seeds_of(corpus, prefix_tokens=5)),
        written(store, model, seeds_of(corpus, drop=0.5)),
        written(store, model, seeds_of(corpus), WindowRequest(6, 32, 1)),
        written(store, model, seeds_of(corpus), temperature=TemperatureSchedule(0.5, 0.5)),
        written(store, model, seeds_of(grown)),
    ]
    assert len({one.key for one in [first, *others]}) == 6
    assert len({tuple(one.tokens_SL.flatten().tolist()) for one in [first, *others]}) == 6


def test_conversations_are_continued_as_the_template_renders_them(store: Store, model, tmp_path: Path) -> None:
    lines = (json.dumps({"messages": chat}) + "\n" for chat in chats(60, longest=30))
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    seeds = seeds_of(ingest(store, "chats", [str(tmp_path / "chats.jsonl")], split="train").corpus)

    def continued(template: str):
        tokenizer = chat_tokenizer(template)
        return continued_windows(store, model, MODEL, tokenizer, TOKENIZER, REQUEST, seeds, batch=4)

    first, other = continued("begin-once"), continued("own-system")
    assert first.key != other.key
    assert not torch.equal(first.tokens_SL, other.tokens_SL)
    assert continued("begin-once").key == first.key


def test_progress_counts_tokens_while_texts_are_written(store: Store, model, corpus: Corpus) -> None:
    done: list[int] = []
    written(store, model, seeds_of(corpus), batch=4, progress=lambda tokens, _: done.append(tokens))
    batches = len(texts_of(store)) // 4
    assert len(done) > 4 * batches
    assert done[-1] == REQUEST.windows * REQUEST.length


def test_an_interrupted_run_goes_on(tmp_path: Path, store: Store, model, corpus: Corpus) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, needed: int) -> None:
        if done > needed / 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        written(store, model, seeds_of(corpus), batch=1, progress=interrupt)
    before = {artifact.key for artifact in store.list("generations")}
    resumed = written(store, model, seeds_of(corpus), batch=1)
    assert 0 < len(before) < len(texts_of(store))
    whole = Store(tmp_path / "other")
    again = land(whole, tmp_path, "legal", 30)
    assert again == corpus
    assert torch.equal(written(whole, model, seeds_of(again), batch=1).tokens_SL, resumed.tokens_SL)


def test_documents_begin_again_when_there_are_no_more_and_short_ones_are_passed_by(
    store: Store, model, tmp_path: Path
) -> None:
    land(store, tmp_path, "few", 5, sentences=1, seed=2)
    few = land(store, tmp_path, "few", 4, sentences=5, seed=3)
    long = seeds_of(few, prefix_tokens=40)
    assert written(store, model, long, WindowRequest(8, 64)).tokens_SL.shape == (8, 64)
    texts = texts_of(store)
    begun = [tuple(text.tokens[:41]) for text in texts]
    assert len(set(begun)) <= 4 < len(begun)
    assert len({tuple(text.tokens) for text in texts}) == len(texts)
    with pytest.raises(CalibrationError, match="few: no train document is as long as a prefix"):
        written(store, model, seeds_of(few, prefix_tokens=1000), WindowRequest(8, 2000))
    with pytest.raises(CalibrationError, match="the prefixes leave no tokens to generate"):
        written(store, model, long, WindowRequest(8, 64), max_length=40)


def test_a_model_that_adds_nothing_is_an_error(store: Store, corpus: Corpus) -> None:
    mute = tiny_llama(seed=1)
    mute.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor([1]), 100.0))
    with pytest.raises(CalibrationError, match="legal: the model adds hardly anything"):
        written(store, mute, seeds_of(corpus))
