"""Perplexity equals that of a slow loop over tokens, for any batching of the windows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscal.errors import EvaluationError
from crosscal.evaluation import Measurement, logits, perplexity, window_nll, windows_of
from crosscal.models.loading import load_variant
from tests.helpers.tiny_models import FAMILIES, VOCABULARY, save_model
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer

ROUNDOFF_F32 = 1e-5


def windows(count: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 400, (count, length), generator=torch.Generator().manual_seed(1))


def slow_nll(model, tokens_SL: torch.Tensor) -> np.ndarray:
    """Reference: one float64 forward pass per predicted token."""
    model = model.double()
    nll_S = []
    for tokens_L in tokens_SL:
        total = 0.0
        for position in range(1, len(tokens_L)):
            with torch.no_grad():
                logits_V = model(input_ids=tokens_L[None, :position]).logits[0, -1]
            total -= (logits_V[tokens_L[position]] - logits_V.logsumexp(0)).item()
        nll_S.append(total)
    return np.array(nll_S)


def test_equals_a_loop_over_tokens() -> None:
    tokens_SL = windows()
    expected_S = slow_nll(tiny_llama(), tokens_SL)
    measured = perplexity(tiny_llama(), tokens_SL, name="general", split="test", device="cpu")
    mean_S = expected_S / 11
    assert measured.value == pytest.approx(math.exp(mean_S.mean()), rel=ROUNDOFF_F32)
    assert measured.stderr == pytest.approx(math.exp(mean_S.mean()) * np.std(mean_S, ddof=1) / math.sqrt(5), rel=1e-4)
    assert (measured.corpus_or_task, measured.split, measured.metric) == ("general", "test", "perplexity")
    assert measured.tokens == 60
    np.testing.assert_allclose(window_nll(tiny_llama(), tokens_SL, device="cpu"), expected_S, rtol=ROUNDOFF_F32)


def test_what_each_window_had_is_kept_and_read_back() -> None:
    tokens_SL = windows()
    measured = perplexity(tiny_llama(), tokens_SL, name="general", split="test", device="cpu")
    assert measured.window_nll is not None
    expected_S = window_nll(tiny_llama(), tokens_SL, device="cpu") / 11
    np.testing.assert_allclose(measured.window_nll, expected_S, atol=1e-7)
    assert math.exp(np.mean(measured.window_nll)) == pytest.approx(measured.value, rel=1e-6)
    assert Measurement.from_json(json.loads(json.dumps(dataclasses.asdict(measured)))) == measured


def test_measurements_of_older_versions_are_read() -> None:
    older = {"corpus_or_task": "general", "split": "test", "metric": "perplexity", "value": 2.0, "stderr": 0.1}
    assert Measurement.from_json({**older, "tokens": 60, "seconds": 1.0, "skipped": None}).window_nll is None


@pytest.mark.parametrize("batch_tokens", [1, 12, 25, 10_000])
def test_batches_do_not_matter(batch_tokens: int) -> None:
    model, tokens_SL = tiny_llama(), windows()
    whole_S = window_nll(model, tokens_SL, device="cpu")
    torch.testing.assert_close(
        window_nll(model, tokens_SL, device="cpu", batch_tokens=batch_tokens), whole_S, rtol=ROUNDOFF_F32, atol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_pieces_are_those_of_the_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain reference, including what a family does to its logits (Gemma 2 caps them)."""
    model = load_variant(save_model(family, tmp_path / "model"))
    tokens_SL = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_p_SPV = model(input_ids=tokens_SL, use_cache=False).logits[:, :-1].double().log_softmax(dim=-1)
        expected_S = -log_p_SPV.gather(2, tokens_SL[:, 1:, None]).sum(dim=(1, 2))
    with logits.reading(model, tokens_SL[0]) as reader:
        assert reader.is_in_pieces
    for rows in (1, 7, 10_000):
        monkeypatch.setattr(logits, "LOGITS_BYTES", rows * logits.row_bytes(VOCABULARY, 4))
        found_S = window_nll(model, tokens_SL, device="cpu", batch_tokens=48)
        torch.testing.assert_close(found_S, expected_S, rtol=ROUNDOFF_F32, atol=0)
    assert "forward" not in vars(model.get_decoder())


def test_a_model_whose_logits_cannot_be_had_in_pieces_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_SL = tiny_llama(), windows()
    expected_S = window_nll(model, tokens_SL, device="cpu")
    monkeypatch.setattr(logits, "are_in_pieces", lambda *_: False)
    torch.testing.assert_close(window_nll(model, tokens_SL, device="cpu"), expected_S, rtol=ROUNDOFF_F32, atol=0)


def test_the_windows_measured_are_told() -> None:
    told: list[tuple[int, int]] = []
    window_nll(tiny_llama(), windows(), device="cpu", batch_tokens=24, progress=lambda *now: told.append(now))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(model, windows(), name="general", split="test", device="cpu")
    assert measured.value == pytest.approx(400, rel=ROUNDOFF_F32)
    assert measured.stderr == pytest.approx(0, abs=1e-2)


def test_one_window_has_no_standard_error() -> None:
    assert perplexity(tiny_llama(), windows(1), name="general", split="test", device="cpu").stderr is None


def test_the_model_keeps_its_mode() -> None:
    model = tiny_llama().train()
    window_nll(model, windows(), device="cpu")
    assert model.training


def test_damaged_weights_are_an_error_that_names_the_corpus() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(EvaluationError, match=r"biomedical \(test\): the perplexity is not finite"):
        perplexity(model, windows(), name="biomedical", split="test", device="cpu")


@pytest.mark.parametrize(
    ("tokens_SL", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), "nothing to predict"),
        (torch.zeros(3, 1, dtype=torch.int64), "nothing to predict"),
        (torch.zeros(1, 129, dtype=torch.int64), "129 tokens, 128 positions"),
        (torch.full((1, 8), 400), "ids from 400 to 400, 400 embeddings"),
        (torch.full((1, 8), -1), "outside the model's vocabulary"),
    ],
)
def test_windows_that_do_not_fit_the_model(tokens_SL: torch.Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        window_nll(tiny_llama(), tokens_SL, device="cpu")


def test_windows_are_the_documents_joined_and_cut() -> None:
    tokenizer = tiny_tokenizer()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = [token for text in SENTENCES for token in [*tokenizer(text)["input_ids"], end]]
    without_SL = windows_of(iter(SENTENCES), tokenizer, 8, begin=False)
    assert without_SL.dtype == torch.int64
    assert without_SL.flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert stream[0] == begin
    assert stream.count(end) == len(SENTENCES)
    tokens_SL = windows_of(iter(SENTENCES), tokenizer, 8)
    assert (tokens_SL[:, 0] == begin).all()
    assert (tokens_SL[:, 1] != begin).all()
    told = [token for token in tokens_SL.flatten().tolist() if token != begin]
    assert told == [token for token in stream if token != begin][: len(told)]
    assert len(stream) // 8 <= len(tokens_SL) <= len(stream) // 7


@pytest.mark.parametrize("wanted", [1, 3, 7])
def test_fewer_windows_are_spread_over_all_documents(wanted: int) -> None:
    tokenizer = tiny_tokenizer()
    whole_SL = windows_of(SENTENCES * 3, tokenizer, 8)
    chosen_SL = windows_of(SENTENCES * 3, tokenizer, 8, wanted)
    assert chosen_SL.tolist() == [whole_SL[i * len(whole_SL) // wanted].tolist() for i in range(wanted)]


def test_more_windows_than_there_are() -> None:
    tokenizer = tiny_tokenizer()
    assert windows_of(SENTENCES, tokenizer, 8, 10_000).equal(windows_of(SENTENCES, tokenizer, 8))


@pytest.mark.parametrize("texts", [[], ["short"]])
def test_too_little_text(texts: list[str]) -> None:
    with pytest.raises(EvaluationError, match="not enough text for one window"):
        windows_of(texts, tiny_tokenizer(), 64)


def test_without_special_tokens() -> None:
    tokenizer = tiny_tokenizer(begin=False, end=False)
    expected = [token for text in SENTENCES for token in tokenizer(text)["input_ids"]]
    assert windows_of(SENTENCES, tokenizer, 8).flatten().tolist() == expected[: len(expected) // 8 * 8]
