"""Nested prefixes, their spectra, and the verdict on whether there is enough calibration text."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from crosscal.evaluation import window_nll
from crosscal.models import ModelSource, likelihood
from crosscal.models.loading import load_variant
from crosscal.report.rows import LayerRow, ResultRow
from crosscal.report.sufficiency import ADD, ENOUGH, GAIN_LIMIT, UNKNOWN, Point, expected_gain, gap_sentences, verdict
from crosscal.stages.describe import starved_experts
from crosscal.stages.moments import perplexity_of
from crosscal.stages.prefixes import NEEDED, nested_sums, pieces_of
from crosscal.stages.sufficiency import sufficiency
from crosscal.statistics import InputMoments
from crosscal.statistics.spectrum import spectrum
from crosscal.store import Store
from tests.helpers.tiny_models import save_model
from tests.helpers.tiny_run import collect, dense_cache, sample, tiny_source, windows

OPTIONS = {"device": "cpu", "batch_tokens": 64}


def rotation(inputs: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(inputs, inputs, dtype=torch.float64))[0]


def curve(held_out: list[float], calibration: list[float]) -> list[Point]:
    pairs = zip(calibration, held_out, strict=True)
    return [Point(2**k, 2**k, loss, held_out_loss) for k, (loss, held_out_loss) in enumerate(pairs)]


# --- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1,), (2,), (7,), (64,), (3, 1, 40)])
def test_pieces_are_the_nested_prefixes_of_every_part(lengths: tuple[int, ...]) -> None:
    parts = [windows(count, seed) for seed, count in enumerate(lengths)]
    pieces = pieces_of(parts)
    assert list(pieces) == sorted(pieces)
    assert max(pieces) == sum(lengths)
    seen: list[list[int]] = []
    for size, piece in pieces.items():
        seen += torch.cat(piece).tolist()
        assert len(seen) == size
        of_parts = [[row for row in seen if row in part.tolist()] for part in parts]
        assert all(rows == part.tolist()[: len(rows)] for rows, part in zip(of_parts, parts, strict=True))


def test_moments_of_prefixes_add_up_to_the_whole_bit_for_bit() -> None:
    """With integer inputs, whose sums are exact in any order."""
    input_TI = torch.randint(-9, 10, (96, 12), generator=torch.Generator().manual_seed(0)).float()
    ends = (12, 24, 48, 96)
    pieces = {end: InputMoments.of(input_TI[start:end]) for start, end in zip((0, *ends), ends, strict=False)}
    for end, found in nested_sums(pieces):
        undivided = InputMoments.of(input_TI[:end])
        assert found.tokens == undivided.tokens == end
        assert all(torch.equal(found[which], undivided[which]) for which in undivided.sums)


# --- the spectrum ----------------------------------------------------------------------------------------------------


def test_the_effective_rank_of_equal_eigenvalues_is_their_number() -> None:
    for rank in (1, 3, 8):
        basis_IR = rotation(8)[:, :rank]
        assert spectrum(basis_IR @ basis_IR.T).effective_rank == pytest.approx(rank)
    assert spectrum(torch.eye(5)).condition == pytest.approx(1)


def test_the_spectrum_knows_neither_scale_nor_rotation() -> None:
    torch.manual_seed(0)
    input_TI = torch.randn(50, 10, dtype=torch.float64) * torch.logspace(0, -2, 10)
    hessian_II, turn_II = input_TI.T @ input_TI, rotation(10)
    plain = spectrum(hessian_II)
    for other_II in (1e-3 * hessian_II, 1e5 * hessian_II, turn_II @ hessian_II @ turn_II.T):
        assert dataclasses.astuple(spectrum(other_II)) == pytest.approx(dataclasses.astuple(plain), rel=1e-8)
    values = sorted(torch.linalg.svdvals(input_TI).square().tolist())
    shares = [value / sum(values) for value in values]
    assert plain.effective_rank == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    shift = 0.01 * sum(values) / 10
    assert plain.condition == pytest.approx((values[-1] + shift) / (values[0] + shift))


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_of_losses_that_fall_like_one_over_n_the_next_doubling_is_foretold() -> None:
    sizes, least, excess = (1, 2, 4, 8), 0.04, 0.02
    points = curve([least + excess / n for n in sizes], [least - excess / n for n in sizes])
    assert expected_gain(points) == pytest.approx(1 - (least + excess / 16) / (least + excess / 8))


def test_a_gap_that_more_text_does_not_close_promises_nothing() -> None:
    assert expected_gain(curve([0.05] * 4, [0.03] * 4)) == 0
    assert expected_gain(curve([0.05, 0.04, 0.03, 0.02], [0.02] * 4)) == 0


def test_the_verdict_turns_once_as_the_gain_grows() -> None:
    gains = [step * GAIN_LIMIT / 10 for step in range(30)]
    found = [verdict(gain) for gain in gains]
    assert found == sorted(found, reverse=True)
    assert {verdict(GAIN_LIMIT), verdict(0.99 * GAIN_LIMIT), verdict(None)} == {ADD, ENOUGH, UNKNOWN}
    gaps = [verdict(expected_gain(curve([0.09, 0.06], [0.01, 0.06 - gap]))) for gap in (0, 0.004, 0.01, 0.05)]
    assert gaps == [ENOUGH, ENOUGH, ADD, ADD]


def test_a_runs_own_losses_say_what_they_can_of_each_mixture() -> None:
    row = LayerRow(
        *("sparse-general", "layer", 0, "site", "sparsegpt", {}, 1.0),
        relative_loss=0.03,
        heldout_relative_loss=0.05,
        sparsity=0.5,
        bits=None,
        damping=0.01,
        dead_inputs=0,
        tokens=512,
        seconds=0.0,
    )
    result = {"method": "sparsegpt", "setting": {}, "upstream": "dense", "seed": 0, "corpus_or_task": "general"}
    result |= {"split": "test", "metric": "perplexity", "value": 9.0, "stderr": None, "tokens": 1}
    result |= {"seconds": 0.0, "model": "m", "device": "cpu"}
    mixtures = {"sparse-general": {"general": 1.0}, "close": {"legal": 1.0}, "both": {"general": 0.5, "legal": 0.5}}
    results = [ResultRow(variant=name, mixture=mixture, **result) for name, mixture in mixtures.items()]
    close = dataclasses.replace(row, variant="close", heldout_relative_loss=0.0301)
    dense = dataclasses.replace(row, variant="close", heldout_relative_loss=0.9, fallback="keep-dense: …")
    both = dataclasses.replace(row, variant="both")
    found = gap_sentences(results, [row, close, dense, both])
    assert [sentence.split(";")[0] for sentence in found] == ["general: perhaps too little", "legal: enough"]
    assert "-10.0% (sparse-general)" in found[0], "(.05 - .03) / 4 / .05"
    assert gap_sentences(results, [dataclasses.replace(row, heldout_relative_loss=None)]) == []


# --- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return tiny_source(tmp_path / "model")


def test_a_curve_is_measured_once_and_the_same_from_stored_moments(tmp_path: Path, source: ModelSource) -> None:
    curves, tokens = [], []
    for home, is_read in (("fresh", False), ("read", True)):
        store = Store(tmp_path / home)
        cached = dataclasses.replace(dense_cache(store, source), wanted=NEEDED)
        text = sample(store, "legal", windows(18, seed=0))
        if is_read:
            collect(cached, source, text.sets)
        first = sufficiency(cached, source, text, **OPTIONS)
        again = sufficiency(cached, source, dataclasses.replace(text, corpus="law"), **OPTIONS)
        assert again == dataclasses.replace(first, corpus="law", tokens_read=0)
        assert json.loads(json.dumps(first.as_json(), allow_nan=False))["verdict"] in (ENOUGH, ADD)
        curves.append(first)
        tokens.append(first.tokens_read)
    assert tokens == [18 * 32, 8 * 32], "half of the calibration windows where the rest is in the store"
    fresh, read = curves
    assert [point.windows for point in fresh.points] == [2, 4, 8, 16]
    assert [point.tokens for point in fresh.points] == [64, 128, 256, 512]
    for one, other in zip(fresh.points, read.points, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-3)
    assert fresh.matrices == 2 * 7
    assert {site.tokens for site in fresh.sites} == {512}
    assert all(site.effective_rank and 1 <= site.effective_rank <= site.inputs for site in fresh.sites)


def test_sets_of_other_weights_count_alike_whether_their_moments_are_stored(
    tmp_path: Path, source: ModelSource
) -> None:
    curves = []
    for home in ("fresh", "read"):
        store = Store(tmp_path / home)
        cached = dataclasses.replace(dense_cache(store, source), wanted=NEEDED)
        text = sample(store, "legal", windows(10, seed=1), windows(4, seed=2, high=40))
        assert [part.weight for part in text.calibration.parts] == [1.25, 2]
        if home == "read":
            collect(cached, source, text.sets)
        curves.append(sufficiency(cached, source, text, **OPTIONS))
    for one, other in zip(*(found.points for found in curves), strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-4)


def test_tokens_of_a_curve_are_those_of_its_windows(tmp_path: Path, source: ModelSource) -> None:
    """Where older sets are folded, only the newest are measured."""
    store = Store(tmp_path / "home")
    text = sample(store, "legal", windows(10, seed=0), windows(10, seed=1))
    older, newest = text.calibration.apart
    text = dataclasses.replace(text, calibration=dataclasses.replace(text.calibration, apart=(newest,), folded=older))
    found = sufficiency(dense_cache(store, source), source, text, **OPTIONS)
    assert [(point.windows, point.tokens) for point in found.points] == [(n, 32 * n) for n in (1, 2, 4, 8)]


def test_one_window_gives_no_verdict(tmp_path: Path, source: ModelSource) -> None:
    store = Store(tmp_path / "home")
    found = sufficiency(dense_cache(store, source), source, sample(store, "legal", windows(3, seed=0)), **OPTIONS)
    assert (found.verdict, found.expected_gain, len(found.points)) == (UNKNOWN, None, 1)


@pytest.mark.parametrize("length", [10, 256])
def test_reading_a_set_leaves_the_perplexity_of_its_first_windows(
    tmp_path: Path, source: ModelSource, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "SCORED_LENGTH", length)
    store = Store(tmp_path / "home")
    cached, text = dense_cache(store, source), sample(store, "legal", windows(10, seed=0))
    assert perplexity_of(cached, text.calibration.key) is None
    collect(cached, source, text.sets)
    model, read_SL = load_variant(source.path, device="cpu"), windows(10, seed=0)[:8, :length]
    expected = window_nll(model, read_SL, device="cpu").mean() / (read_SL.shape[1] - 1)
    assert perplexity_of(cached, text.calibration.key) == pytest.approx(float(expected.exp()), rel=1e-5)


def test_experts_with_fewer_tokens_than_inputs_are_starved(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("mixtral", tmp_path / "model"))
    store = Store(tmp_path / "home")
    cached, counts = dense_cache(store, source), []
    for count in (3, 80):
        text = sample(store, "legal", windows(count, seed=0, high=60))
        collect(cached, source, text.sets)
        found = starved_experts(cached, source.blocks, [text]).get("legal", {"starved": 0})
        tokens = [
            (cached.read(text.calibration.key, block, site).tokens, site.inputs)
            for block in range(source.blocks)
            for site in cached.sites(block) or ()
            if site.matrices[0].expert is not None
        ]
        assert found["starved"] == sum(seen < inputs for seen, inputs in tokens)
        if found["starved"]:
            assert (found["experts"], found["least_tokens"]) == (len(tokens), min(tokens)[0])
        counts.append(found["starved"])
    assert counts[0] > counts[1] == 0
