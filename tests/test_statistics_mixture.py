"""Mixtures weight per-token means, so only the weights, not the corpus sizes, determine a corpus's influence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosscal.errors import EmptyStatistics, NotFinite, StatisticsError, UsageError
from crosscal.statistics import InputMoments, Mixture, Statistic
from tests.helpers.problems import correlated_inputs_TI

GENERAL_TI = correlated_inputs_TI(120, 12, seed=1)
DOMAIN_TI = 3 * correlated_inputs_TI(50, 12, seed=2)
LEGAL_TI = correlated_inputs_TI(31, 12, seed=3)
MOMENTS = {
    "general": InputMoments.of(GENERAL_TI),
    "domain": InputMoments.of(DOMAIN_TI),
    "legal": InputMoments.of(LEGAL_TI),
}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def second_moment_II(input_TI: Tensor) -> Tensor:
    return torch.einsum("ti,tj->ij", input_TI, input_TI) / len(input_TI)


@pytest.mark.parametrize("trace_normalised", [False, True])
def test_weight_one_is_that_corpus_bit_for_bit(trace_normalised: bool) -> None:
    for mixture in (Mixture.of({"general": 1, "domain": 0}), Mixture.alpha("domain", 0.0)):
        mixed_II = mixture.hessian_II(MOMENTS, trace_normalised=trace_normalised)
        assert torch.equal(mixed_II, MOMENTS["general"].hessian_II())
    domain_II = Mixture.alpha("domain", 1.0).hessian_II(MOMENTS, trace_normalised=trace_normalised)
    assert torch.equal(domain_II, MOMENTS["domain"].hessian_II())


def test_a_corpus_of_weight_zero_needs_no_moments() -> None:
    assert Mixture.of({"general": 1.0, "domain": 0.0}).corpora == ("general",)
    Mixture.of({"general": 1.0, "domain": 0.0}).hessian_II({"general": MOMENTS["general"]})


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_mixes_second_moments_per_token(alpha: float) -> None:
    expected_II = (1 - alpha) * second_moment_II(GENERAL_TI) + alpha * second_moment_II(DOMAIN_TI)
    assert_close(Mixture.alpha("domain", alpha).hessian_II(MOMENTS), expected_II)


@pytest.mark.parametrize("percent", range(101))
def test_alpha_is_the_mixture_of_the_weights_a_user_would_write(percent: int) -> None:
    written = Mixture.of({"general": float(f"{(100 - percent) / 100:.2f}"), "domain": percent / 100})
    assert Mixture.alpha("domain", percent / 100) == written


def test_weights_of_any_alpha_sum_to_one() -> None:
    for alpha in (1 / 3, 2 / 3, 0.1234567890123456, 1e-15):
        assert sum(Mixture.alpha("domain", alpha).as_dict().values()) == 1.0


def test_duplicating_a_domain_changes_nothing() -> None:
    mixture = Mixture.alpha("domain", 0.3)
    twice = {**MOMENTS, "domain": MOMENTS["domain"] + MOMENTS["domain"]}
    assert torch.equal(mixture.hessian_II(twice), mixture.hessian_II(MOMENTS))
    assert torch.equal(mixture.mean_abs_I(twice), mixture.mean_abs_I(MOMENTS))


def test_concatenation_is_the_mixture_by_token_counts() -> None:
    alpha = len(DOMAIN_TI) / (len(GENERAL_TI) + len(DOMAIN_TI))
    joined_TI = torch.cat([GENERAL_TI, DOMAIN_TI])
    joined = MOMENTS["general"] + MOMENTS["domain"]
    mixture = Mixture.alpha("domain", alpha)
    assert_close(mixture.hessian_II(MOMENTS), second_moment_II(joined_TI))
    assert_close(mixture.hessian_II(MOMENTS), joined.hessian_II())
    assert_close(mixture.mean_abs_I(MOMENTS), joined_TI.abs().mean(0))


def test_several_domains_in_any_order() -> None:
    mixture = Mixture.of({"legal": 0.3, "general": 0.5, "domain": 0.2})
    expected_II = (
        0.5 * second_moment_II(GENERAL_TI) + 0.2 * second_moment_II(DOMAIN_TI) + 0.3 * second_moment_II(LEGAL_TI)
    )
    assert_close(mixture.hessian_II(MOMENTS), expected_II)
    assert mixture == Mixture.of({"domain": 0.2, "legal": 0.3, "general": 0.5})
    assert mixture.as_dict() == {"domain": 0.2, "general": 0.5, "legal": 0.3}


def test_the_mixture_is_symmetric_and_leaves_the_moments_alone() -> None:
    before = {name: moments.gram_II.clone() for name, moments in MOMENTS.items()}
    mixed_II = Mixture.of({"general": 0.4, "domain": 0.3, "legal": 0.3}).hessian_II(MOMENTS, trace_normalised=True)
    assert torch.equal(mixed_II, mixed_II.mT)
    assert all(torch.equal(MOMENTS[name].gram_II, gram_II) for name, gram_II in before.items())


def test_trace_normalisation_forgets_the_scale_of_a_corpus_and_keeps_the_trace() -> None:
    mixture = Mixture.alpha("domain", 0.4)
    mixed_II = mixture.hessian_II(MOMENTS, trace_normalised=True)
    louder_II = mixture.hessian_II({**MOMENTS, "domain": InputMoments.of(100 * DOMAIN_TI)}, trace_normalised=True)
    assert_close(louder_II / louder_II.trace(), mixed_II / mixed_II.trace())
    assert_close(mixed_II.trace(), mixture.hessian_II(MOMENTS).trace())
    shares = [second_moment_II(rows_TI) / second_moment_II(rows_TI).trace() for rows_TI in (GENERAL_TI, DOMAIN_TI)]
    assert_close(mixed_II / mixed_II.trace(), 0.6 * shares[0] + 0.4 * shares[1])


ROWS_TI = {"general": GENERAL_TI, "domain": DOMAIN_TI, "legal": LEGAL_TI}


DENSE_TI = {corpus: rows_TI + 0.3 * rows_TI.roll(1, dims=1) for corpus, rows_TI in ROWS_TI.items()}


def means_of(rows_TI: Tensor, dense_TI: Tensor) -> dict[Statistic, Tensor]:
    """Return the means, computed token by token."""
    tokens, dense = list(rows_TI.double()), list(dense_TI.double())
    each = {
        Statistic.GRAM: [x.outer(x) for x in tokens],
        Statistic.SQUARE_SUM: [x * x for x in tokens],
        Statistic.ABS_SUM: [x.abs() for x in tokens],
        Statistic.SUM: tokens,
        Statistic.CROSS: [d.outer(x) for d, x in zip(dense, tokens, strict=True)],
        Statistic.DRIFT: [(d - x).outer(d - x) for d, x in zip(dense, tokens, strict=True)],
    }
    return {which: torch.stack(terms).mean(0) for which, terms in each.items()}


@pytest.mark.parametrize(
    "weights", [{"domain": 1.0}, {"general": 0.6, "domain": 0.4}, {**dict.fromkeys(ROWS_TI, 1 / 3)}]
)
@pytest.mark.parametrize("trace_normalised", [False, True])
@pytest.mark.parametrize("wanted", [tuple(Statistic), (Statistic.SQUARE_SUM, Statistic.SUM)])
def test_every_statistic_is_that_of_corpora_brought_to_one_trace(
    weights: dict[str, float], trace_normalised: bool, wanted: tuple[Statistic, ...]
) -> None:
    """The reference scales the inputs, x_k → √s_k x_k, and never a statistic."""
    means = {corpus: means_of(ROWS_TI[corpus], DENSE_TI[corpus]) for corpus in ROWS_TI}
    means = {corpus: {which: every[which] for which in wanted} for corpus, every in means.items()}
    traces = {corpus: float(rows_TI.double().square().sum()) / len(rows_TI) for corpus, rows_TI in ROWS_TI.items()}
    target = sum(weight * traces[corpus] for corpus, weight in weights.items())
    scales = {corpus: (target / traces[corpus]) ** 0.5 if trace_normalised else 1.0 for corpus in ROWS_TI}
    scaled = {corpus: means_of(s * ROWS_TI[corpus], s * DENSE_TI[corpus]) for corpus, s in scales.items()}
    mixed = Mixture.of(weights).mix(means, trace_normalised=trace_normalised)
    assert set(mixed) == set(wanted)
    for which, mean in mixed.items():
        assert_close(mean, sum((w * scaled[corpus][which] for corpus, w in weights.items()), torch.zeros(())))


@pytest.mark.parametrize("which", Statistic)
def test_a_statistic_moves_with_its_inputs(which: Statistic) -> None:
    scale_I = torch.rand(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.2
    dense_TI = DENSE_TI["general"]
    mean, expected = means_of(GENERAL_TI, dense_TI)[which], means_of(GENERAL_TI / scale_I, dense_TI / scale_I)[which]
    assert_close(which.divided(mean, scale_I), expected)


def test_trace_normalisation_allows_a_corpus_of_zeros() -> None:
    silent = {**MOMENTS, "domain": InputMoments.of(torch.zeros_like(DOMAIN_TI))}
    mixed_II = Mixture.alpha("domain", 0.4).hessian_II(silent, trace_normalised=True)
    assert_close(mixed_II / mixed_II.trace(), second_moment_II(GENERAL_TI) / second_moment_II(GENERAL_TI).trace())


@pytest.mark.parametrize(
    "weights",
    [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": float("nan"), "b": 1.0}, {"a": float("inf")}],
)
def test_bad_weights(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="sum to 1"):
        Mixture.of(weights)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(UsageError):
        Mixture.alpha("domain", alpha)


def test_alpha_of_the_general_corpus_is_the_general_corpus() -> None:
    assert Mixture.alpha("general", 0.7) == Mixture.of({"general": 1.0})


def test_missing_moments_are_named() -> None:
    with pytest.raises(StatisticsError, match=r"blocks\.2\.qkv: .*no domain, legal"):
        Mixture.of({"general": 0.5, "domain": 0.2, "legal": 0.3}).hessian_II(
            {"general": MOMENTS["general"]}, name="blocks.2.qkv"
        )


def test_sites_of_another_width_are_refused() -> None:
    with pytest.raises(StatisticsError, match="'domain': 3"):
        Mixture.alpha("domain", 0.5).hessian_II({**MOMENTS, "domain": InputMoments.zero(3, torch.float64)})


def test_a_corpus_without_tokens_is_named() -> None:
    with pytest.raises(EmptyStatistics, match=r"qkv \(domain\)"):
        Mixture.alpha("domain", 0.5).hessian_II({**MOMENTS, "domain": InputMoments.zero(12, torch.float64)}, name="qkv")


def test_a_corpus_that_is_not_finite_is_named() -> None:
    broken_TI = DOMAIN_TI.clone()
    broken_TI[3, 4] = float("nan")
    with pytest.raises(NotFinite, match=r"qkv \(domain\)"):
        Mixture.alpha("domain", 0.5).hessian_II({**MOMENTS, "domain": InputMoments.of(broken_TI)}, name="qkv")
