"""Self-calibration: generated texts equal those of plain sampling, also after an interruption."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from crosscal.calibration import TemperatureSchedule, WindowRequest, generate_windows
from crosscal.calibration.generation import first_token_ids
from crosscal.calibration.sampling import SequenceWriter, sequence_bytes
from crosscal.calibration.stop_words import STOP_WORDS
from crosscal.errors import CalibrationError, UsageError
from crosscal.store import Store
from tests.helpers.plain_sampling import uncached
from tests.helpers.tiny_text import tiny_llama, tiny_tokenizer

MODEL, TOKENIZER = "a" * 64, "b" * 64
REQUEST = WindowRequest(6, 32)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def exact_model():
    """Computes in float64: with and without a cache, probabilities differ too little to change a token."""
    return tiny_llama().double()


def generate(store, model, request=REQUEST, **settings):
    settings = {"batch": 3, **settings}
    return generate_windows(store, model, MODEL, tiny_tokenizer(), TOKENIZER, request, **settings)


def writer(model, **settings) -> SequenceWriter:
    plain = {"start": 0, "end": 1, "length": 40, "temperature": TemperatureSchedule(), "first_ids": None}
    return SequenceWriter(model, **{**plain, "device": "cpu", **settings})


def sequences(store: Store) -> list[list[int]]:
    batches = sorted(store.list("generations"), key=lambda artifact: artifact.provenance["numbers"])
    return [row for batch in batches for row in json.loads(store.read_bytes(batch, "sequences.json"))]


def common_end(model) -> int:
    """Return a token that the model writes often: as end token it makes rows end at different positions."""
    rows = writer(model).write(range(64), seed=1)
    return int(torch.tensor([token for row in rows for token in row[5:]]).bincount().argmax())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"first_ids": (70, 71, 300)},
        {"temperature": TemperatureSchedule(1.5, 0.7)},
        {"temperature": TemperatureSchedule(2.0, 0.0, steps=5)},
    ],
)
def test_cached_sampling_equals_uncached(exact_model, settings):
    sampler = writer(exact_model, end=common_end(exact_model), **settings)
    rows = sampler.write(range(16), seed=7)
    assert rows == [uncached(exact_model, sampler, number, seed=7) for number in range(16)]
    assert len({len(row) for row in rows}) > 1
    assert sampler.write(range(16), seed=8) != rows


def test_a_sequence_does_not_depend_on_those_beside_it(model):
    sampler = writer(model, end=common_end(model))
    rows = sampler.write(range(16), seed=7)
    assert [sampler.write(range(number, number + 1), seed=7) for number in range(16)] == [[row] for row in rows]
    assert dataclasses.replace(sampler, at_once=5).write(range(3, 16), seed=7) == rows[3:]


def test_a_model_without_such_a_cache_is_an_error():
    config = MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(CalibrationError, match="returns no cache of keys and values"):
        writer(MambaForCausalLM(config).eval()).write(range(2), seed=0)


@pytest.mark.parametrize(("kv_heads", "times"), [(4, 1), (2, 2)])
def test_a_sequence_takes_no_more_than_is_said(kv_heads: int, times: int):
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    cached = LlamaForCausalLM(config).eval()(torch.zeros(1, 40).long()).past_key_values.layers
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached)
    sizes = {"blocks": 2, "hidden": 32, "vocabulary": 400, "itemsize": 4}
    assert sequence_bytes(40, 7, **sizes) == times * cache + 7 * 400 * (4 + 4 + 8 + 8)


def test_greedy_equals_generate(model):
    greedy = writer(model, temperature=TemperatureSchedule(0.0, 0.0), length=64)
    expected = model.generate(torch.tensor([[0]]), attention_mask=torch.ones(1, 1), do_sample=False, max_length=64)
    assert greedy.write(range(2), seed=0) == [expected[0].tolist()] * 2


def test_samples_follow_the_models_distribution(model):
    first = torch.tensor([row[1] for row in writer(model, length=2).write(range(20_000), seed=0)])
    with torch.inference_mode():
        probability_V = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(dim=-1)
    expected_V = 20_000 * probability_V
    counts_V = first.bincount(minlength=400)
    assert ((counts_V - expected_V).abs() <= 6 * expected_V.sqrt() + 3).all()


def test_a_generated_set_is_exactly_as_large_as_asked(store, model):
    for request in (REQUEST, WindowRequest(1, 2), WindowRequest(7, 50, 3)):
        generated = generate(store, model, request)
        assert generated.tokens_SL.shape == (request.windows, request.length)
        assert generated.tokens_SL.dtype == torch.int64
        assert generated.notes == ()


def test_windows_are_the_sequences_joined(store, model):
    generated = generate(store, model, WindowRequest(60, 32))
    rows = sequences(store)
    stream, windows = [token for row in rows for token in row], []
    while len(windows) < 60:  # each starts with exactly one start token
        texts = stream[1:] if stream[0] == 0 else stream
        windows, stream = [*windows, [0, *texts[:31]]], texts[31:]
    assert generated.tokens_SL.tolist() == windows
    assert all(row[0] == 0 and 1 not in row[1:-1] for row in rows)
    assert all(row[-1] == 1 or len(row) == 32 for row in rows)
    assert any(len(row) < 32 for row in rows)


def test_first_tokens_are_stop_words(store, model):
    tokenizer = tiny_tokenizer()
    generate(store, model, WindowRequest(40, 16))
    first = [row[1] for row in sequences(store)]
    assert len(first) >= 40
    assert all(tokenizer.decode([token]).strip().lower() in STOP_WORDS for token in first)
    free = generate(store, model, WindowRequest(40, 16), first_tokens=None).tokens_SL
    assert not all(tokenizer.decode([token]).strip().lower() in STOP_WORDS for token in free[:, 1].tolist())


def test_first_token_ids_take_any_case_and_leading_space():
    tokenizer = tiny_tokenizer()
    found = {tokenizer.decode([index]) for index in first_token_ids(tokenizer, ["THE", "a", "every"])}
    assert found == {" the", "a", "A", " a", " every"} | ({"the", "The", " The"} & found)
    with pytest.raises(CalibrationError, match="first_tokens=None"):
        first_token_ids(tokenizer, ["extraordinarily"])


def test_progress_counts_every_token_while_texts_are_written(tmp_path, model):
    reports = []
    generate(Store(tmp_path), model, WindowRequest(12, 16), batch=4, progress=lambda *report: reports.append(report))
    done = [each for each, _ in reports]
    assert {total for _, total in reports} == {12 * 16}
    assert done == sorted(done)
    assert done[-1] == 12 * 16
    assert max(after - before for before, after in pairwise([0, *done])) <= 4, "one token of each text at most"


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, model):
    class Interrupted(Exception):
        pass

    def interrupt(done: int, needed: int) -> None:
        if done > needed / 2:
            raise Interrupted

    whole = generate(Store(tmp_path / "one"), model, batch=1)
    store = Store(tmp_path / "two")
    with pytest.raises(Interrupted):
        generate(store, model, batch=1, progress=interrupt)
    assert not list(store.keys("calibration"))
    before = {artifact.key: artifact.created for artifact in store.list("generations")}
    resumed = generate(store, model, batch=1)
    after = {artifact.key: artifact.created for artifact in store.list("generations")}
    assert torch.equal(resumed.tokens_SL, whole.tokens_SL)
    assert resumed.key == whole.key
    assert 0 < len(before) < len(after)
    assert before.items() <= after.items()


def test_how_many_are_written_together_changes_no_text(tmp_path, model):
    sets = [
        generate(Store(tmp_path / str(number)), model, batch=batch, at_once=at_once)
        for number, (batch, at_once) in enumerate([(1, None), (3, 2), (32, 5)])
    ]
    assert len({one.key for one in sets}) == 1
    assert all(torch.equal(one.tokens_SL, sets[0].tokens_SL) for one in sets)


def test_more_windows_begin_with_the_fewer(store, model):
    few = generate(store, model)
    many = generate(store, model, WindowRequest(12, 32))
    assert torch.equal(many.tokens_SL[:6], few.tokens_SL)


def test_settings_that_matter_give_other_texts(store, model):
    sets = [
        generate(store, model),
        generate(store, model, WindowRequest(6, 32, 1)),
        generate(store, model, WindowRequest(6, 32, split="validation")),
        generate(store, model, temperature=TemperatureSchedule(2.0, 1.0)),
        generate(store, model, first_tokens=None),
    ]
    assert len({calibration.key for calibration in sets}) == 5
    assert len({tuple(calibration.tokens_SL.flatten().tolist()) for calibration in sets}) == 5


def test_what_differs_is_noted(store, model):
    shortened = generate(store, model, WindowRequest(2, 500), max_length=40)
    assert shortened.tokens_SL.shape == (2, 40)
    assert shortened.notes == ("Windows have 40 tokens instead of 500: the model takes no more.",)
    tokenizer = tiny_tokenizer(begin=False)
    headless = generate_windows(store, model, MODEL, tokenizer, TOKENIZER, REQUEST)
    assert headless.tokens_SL[0, 0] == tokenizer.eos_token_id
    assert headless.notes == ("The tokenizer has no begin-of-text token: texts begin with end-of-text instead.",)


def test_a_model_that_writes_nothing_is_an_error(store):
    mute = tiny_llama(seed=1)
    mute.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor([1]), 100.0))
    with pytest.raises(CalibrationError, match="generates are too short"):
        generate(store, mute, WindowRequest(200, 64), first_tokens=None, batch=64)


def test_temperatures():
    schedule = TemperatureSchedule(2.0, 1.0, steps=10)
    assert [schedule.at(step) for step in (0, 1, 5, 10, 11, 1000)] == pytest.approx([2.0, 1.9, 1.5, 1.0, 1.0, 1.0])
    assert {TemperatureSchedule().at(step) for step in range(20)} == {1.0}
    for wrong in ({"t_init": -0.1}, {"t_final": -1.0}, {"steps": 0}):
        with pytest.raises(UsageError):
            TemperatureSchedule(**wrong)


def test_stop_words_are_words():
    assert len(set(STOP_WORDS)) == len(STOP_WORDS) > 120
    assert all(word.isalpha() and word.islower() for word in STOP_WORDS)
