"""Windows contain exactly the documents' tokens in the seed's order, and are cached."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscal.calibration import (
    CalibrationSet,
    Pool,
    WindowRequest,
    draw_pool,
    random_windows,
    readable,
    text_quality,
    tokenizer_digest,
)
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import Shard, documents, ingest
from crosscal.errors import CalibrationError, UsageError
from crosscal.store import Store
from tests.helpers.tiny_text import tiny_llama, tiny_tokenizer

TOKENIZER = "0" * 64


@pytest.fixture
def shard(store: Store, tmp_path: Path) -> Shard:
    rows = [f"Document {index} runs past the mill. {'Rain and sun. ' * (index % 9)}" for index in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return ingest(store, "general", [str(tmp_path / "a.jsonl")]).corpus.shards[0]


def stream_of(store: Store, shard: Shard, request: WindowRequest, *, begin: bool) -> list[int]:
    """Return the tokens of all documents in the seed's order, each tokenized separately, as one list."""
    texts = list(documents(store, shard, request.split))
    tokenizer, stream = tiny_tokenizer(begin=begin), []
    for position in np.random.default_rng(np.random.PCG64(request.seed)).permutation(len(texts)):
        start = [0] if begin else []
        stream += start + tokenizer.encode(texts[position], add_special_tokens=False) + [1]
    return stream


def reference(store: Store, shard: Shard, request: WindowRequest, *, begin: bool = True) -> torch.Tensor:
    """Reference, token by token: every window starts with `<s>`; a `<s>` of a document right after it is dropped."""
    windows, window = [], []
    for token in stream_of(store, shard, request, begin=begin):
        if begin and not window:
            window = [0]
        if not (begin and window == [0] and token == 0):
            window = [*window, token]
        if len(window) == request.length:
            windows, window = [*windows, window], []
    return torch.tensor(windows[: request.windows])


def draw(store: Store, shard: Shard, request: WindowRequest, *, begin: bool = True, digest: str = TOKENIZER) -> Pool:
    return draw_pool(store, [shard], tiny_tokenizer(begin=begin), digest, request)


def windows_of(store: Store, pool: Pool) -> torch.Tensor:
    (part,) = pool.parts
    return windows_by_key(store, part.key)


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize(
    "request_",
    [
        WindowRequest(4, 32, 0),
        WindowRequest(100, 64, 1),
        WindowRequest(3, 500, 2),
        WindowRequest(2, 16, 3, "test"),
        WindowRequest(10_000, 48, 4),
    ],
)
def test_windows_are_the_documents_joined_and_cut(store, shard, request_, begin):
    drawn = windows_of(store, draw(store, shard, request_, begin=begin))
    expected = reference(store, shard, request_, begin=begin)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, expected)


def test_a_drawn_set_is_found_again_as_it_was(store, shard, tmp_path):
    drawn = draw(store, shard, WindowRequest(10_000, 64, 5))
    assert draw(Store(tmp_path / "home"), shard, WindowRequest(10_000, 64, 5)) == drawn
    assert len(list(store.list("calibration"))) == 1


def test_windows_are_no_longer_than_the_model_takes():
    assert WindowRequest(4, 64).within(64) == (WindowRequest(4, 64), ())
    note = "Windows have 64 tokens instead of 2048: the model takes no more."
    assert WindowRequest(4, 2048).within(64) == (WindowRequest(4, 64), (note,))


def test_a_found_set_is_not_drawn(store, shard):
    drawn = draw(store, shard, WindowRequest(4, 32))
    store.discard("corpora", shard.key)  # drawing is no longer possible
    assert draw(store, shard, WindowRequest(4, 32)) == drawn


def test_everything_that_matters_has_its_own_set(store, shard):
    requests = [WindowRequest(4, 32), WindowRequest(5, 32), WindowRequest(4, 33), WindowRequest(4, 32, 1)]
    requests.append(WindowRequest(2, 32, split="validation"))
    pools = [draw(store, shard, request) for request in requests]
    pools.append(draw(store, shard, requests[0], digest="1" * 64))
    assert len({part.key for pool in pools for part in pool.parts}) == 6
    drawn = [windows_of(store, pool) for pool in pools]
    assert not torch.equal(drawn[0], drawn[3])
    assert torch.equal(drawn[0], drawn[1][:4])


@pytest.mark.parametrize("split", ["test", "nonsense"])
def test_less_than_a_window_stays_in_the_pool(store, shard, split):
    pool = draw(store, shard, WindowRequest(1, 100_000, split=split))
    assert pool.parts == ()
    tokenizer = tiny_tokenizer()
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents(store, shard, split))
    assert len(pool.rest) == tokens


def test_a_tokenizer_without_end_of_text_is_an_error(store, shard):
    with pytest.raises(CalibrationError, match="no end-of-text token"):
        draw_pool(store, [shard], tiny_tokenizer(end=False), TOKENIZER, WindowRequest(1, 16))


def test_long_documents_make_no_noise(store, shard, caplog):
    tokenizer = tiny_tokenizer()
    longest = max(len(tokenizer.encode(text, verbose=False)) for text in documents(store, shard, "train"))
    assert longest > tokenizer.model_max_length
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING):
        draw_pool(store, [shard], tokenizer, TOKENIZER, WindowRequest(1000, 64))
    assert not caplog.records


@pytest.mark.parametrize(("field", "value"), [("windows", 0), ("length", 1), ("seed", -1)])
def test_requests_are_checked(field, value):
    with pytest.raises(UsageError, match=f"calibration.{field}"):
        WindowRequest(**{field: value})


def test_the_tokenizer_digest_follows_content_alone(tmp_path):
    for name in ("one", "two"):
        tiny_llama(tmp_path / name)
    digest = tokenizer_digest(tmp_path / "one")
    (tmp_path / "two" / "config.json").write_text("{}", encoding="utf-8")
    assert tokenizer_digest(tmp_path / "two") == digest
    path = tmp_path / "two" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert tokenizer_digest(tmp_path / "two") != digest
    with pytest.raises(CalibrationError, match="no tokenizer"):
        tokenizer_digest(tmp_path)


def test_random_windows_are_uniform_over_ordinary_tokens(store):
    tokenizer = tiny_tokenizer()
    drawn = random_windows(store, tokenizer, TOKENIZER, WindowRequest(100, 397))
    counts = torch.bincount(drawn.tokens_SL.flatten(), minlength=len(tokenizer))
    ordinary = len(tokenizer) - 3
    assert counts[:3].tolist() == [100, 0, 0]  # each window starts with `<s>`
    expected = 100 * 396 / ordinary
    assert ((counts[3:] - expected).abs() < 6 * expected**0.5).all()
    again = random_windows(store, tokenizer, TOKENIZER, WindowRequest(100, 397))
    assert torch.equal(again.tokens_SL, drawn.tokens_SL)
    for other in (WindowRequest(100, 397, 1), WindowRequest(100, 397, split="validation")):
        assert not torch.equal(random_windows(store, tokenizer, TOKENIZER, other).tokens_SL, drawn.tokens_SL)


def test_readable_shows_the_windows(store, shard):
    tokens_SL = windows_of(store, draw(store, shard, WindowRequest(4, 64)))
    shown = readable(CalibrationSet(tokens_SL, {}, ()), tiny_tokenizer(), 2)
    assert len(shown) == 2
    assert shown[0].startswith("<s>Document")
    assert "</s><s>Document" in "".join(shown)


def slow_quality(tokens_SL: torch.Tensor, vocabulary: int) -> tuple[float, float, float, float]:
    windows = tokens_SL.tolist()
    tokens = [token for window in windows for token in window]
    repeated = sum(token in window[:place] for window in windows for place, token in enumerate(window)) / len(tokens)
    ratios = []
    for n in range(1, 5):
        ngrams = [tuple(window[place : place + n]) for window in windows for place in range(len(window) - n + 1)]
        ratios.append(len(set(ngrams)) / len(ngrams))
    frequencies = sorted((tokens.count(token) for token in set(tokens)), reverse=True)
    slope = np.polyfit(np.log(np.arange(1, len(frequencies) + 1)), np.log(frequencies), 1)[0]
    return repeated, len(set(tokens)) / vocabulary, sum(ratios) / 4, -slope


@pytest.mark.parametrize(("windows", "length", "vocabulary"), [(5, 40, 12), (1, 100, 3), (20, 7, 400)])
def test_quality_equals_the_definitions(windows, length, vocabulary):
    tokens_SL = (
        torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(0)) ** 2 % vocabulary
    )
    quality = text_quality(tokens_SL, vocabulary)
    measured = (
        quality.repeated_tokens, quality.vocabulary_coverage, quality.ngram_diversity, quality.zipf_coefficient,
    )  # fmt: skip
    assert measured == pytest.approx(slow_quality(tokens_SL, vocabulary), rel=1e-12)


def test_zipf_finds_a_known_exponent():
    counts = [round(10_000 * rank**-1.2) for rank in range(1, 60)]
    tokens = torch.repeat_interleave(torch.arange(59), torch.tensor(counts))[None]
    assert text_quality(tokens, 59).zipf_coefficient == pytest.approx(1.2, abs=0.01)
    assert np.isnan(text_quality(torch.zeros(2, 8, dtype=torch.int64), 59).zipf_coefficient)
