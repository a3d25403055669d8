"""Search for a domain's weight under a bound on general perplexity: the next candidate to evaluate, the final choice.

Only validation windows are used. Perplexities are read from the store, by the digest of a candidate's weights, so this
search is replayed like the search by losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crosscal.evaluation import PERPLEXITY, VALIDATION, Measurement, paired_difference
from crosscal.mixtures import GENERAL, Search
from crosscal.search.rule import MOST_EVALUATED, chosen_weight, next_weight, windows_needed
from crosscal.search.simplex import Weights
from crosscal.stages.candidates import losses_of
from crosscal.stages.choose_mixture import MixtureChoice, candidate, choice_of, replayed, search_of
from crosscal.stages.compress import RunContext
from crosscal.stages.evaluate import EvaluationSet
from crosscal.stages.made_variants import made_before
from crosscal.variants import Variant

Perplexities = Mapping[str, float]
"""Corpus -> perplexity on its validation windows."""


@dataclass(frozen=True)
class _State:
    """What is known by the weight of the domain, and the weight to try next."""

    losses: dict[float, tuple[float, ...]]
    """(general, domain)."""
    evaluated: dict[float, tuple[float, ...]]
    """Perplexities (general, domain)."""
    windows: dict[float, tuple[float, ...]]
    """Mean negative log-likelihood of each general window."""
    wanted: float | None


def perplexities_of(measured: list[Measurement]) -> dict[str, float]:
    """Return corpus -> perplexity on validation windows."""
    return {name: one.value for name, one in _on_validation(measured).items() if one.value is not None}


def _on_validation(measured: list[Measurement]) -> dict[str, Measurement]:
    return {one.corpus_or_task: one for one in measured if (one.metric, one.split) == (PERPLEXITY, VALIDATION)}


def model_wanted(context: RunContext, variant: Variant, eval_set: EvaluationSet, dense: Perplexities) -> Weights | None:
    """Return the mixture whose model to evaluate next; None once the search is over."""
    wanted = _replayed(context, variant, eval_set, dense).wanted
    return None if wanted is None else _weights(search_of(variant), wanted)


def ruled_choice(context: RunContext, variant: Variant, eval_set: EvaluationSet, dense: Perplexities) -> MixtureChoice:
    """Return the best mixture for the domain among the evaluated models that keep the rule."""
    search, state = search_of(variant), _replayed(context, variant, eval_set, dense)
    assert state.wanted is None, "its candidates are evaluated first"
    assert search.general_within is not None
    taken = chosen_weight(state.evaluated, search.general_within)
    tried = {_weights(search, weight): _in_order(search, losses) for weight, losses in state.losses.items()}
    perplexity = {
        _weights(search, weight): dict(zip((GENERAL, search.domain), pair, strict=True))
        for weight, pair in state.evaluated.items()
    }
    count = len(state.evaluated) - 1
    reason = (
        f"the lowest {search.domain} perplexity of general-only and {count} more "
        f"({MOST_EVALUATED} at most) that were evaluated and keep the rule: {_general_change(state, taken)} "
        f"of general-only's general perplexity on validation windows{_unresolved(state, search.general_within)}"
    )
    return choice_of(variant, _weights(search, taken), tried, perplexity, reason)


@dataclass(frozen=True)
class _Change:
    """Relative change of general perplexity from general-only to a weight, over the same validation windows."""

    value: float
    stderr: float | None
    """None for a single window."""

    def __str__(self) -> str:
        """E.g. "+1.8 ± 0.7 %"."""
        return f"{100 * self.value:+.1f}" + ("" if self.stderr is None else f" ± {100 * self.stderr:.1f}") + " %"


def _general_change(state: _State, weight: float) -> _Change:
    ratio = state.evaluated[weight][0] / state.evaluated[0.0][0]
    stderr = paired_difference(state.windows[weight], state.windows[0.0]).stderr
    return _Change(ratio - 1, None if stderr is None else ratio * stderr)


def _unresolved(state: _State, within: float) -> str:
    """Return how many windows would suffice; "" if these do for the evaluated weight that is nearest to the bound."""
    changes = [_general_change(state, weight) for weight in state.evaluated if weight]
    nearest = min(changes, key=lambda change: abs(change.value - within), default=None)
    if nearest is None:
        return ""
    if nearest.stderr is None:
        return "; a single window does not show how sure that is"
    windows = len(state.windows[0.0])
    needed = windows_needed(windows, nearest.stderr, within)
    if needed <= windows:
        return ""
    return (
        f"; {windows} windows show a change near the bound to ± {100 * nearest.stderr:.1f} % (standard error), "
        f"about {needed} would show it to a quarter of the bound"
    )


def _replayed(context: RunContext, variant: Variant, eval_set: EvaluationSet, dense: Perplexities) -> _State:
    search = search_of(variant)
    within, pair_of_dense = search.general_within, (dense[GENERAL], dense[search.domain])
    assert within is not None
    tried, _ = replayed(context, variant)
    losses = {weights[_at(search)]: _in_order(search, each) for weights, each in tried.items()}
    evaluated: dict[float, tuple[float, ...]] = {}
    windows: dict[float, tuple[float, ...]] = {}
    while (weight := next_weight(losses, pair_of_dense, evaluated, within)) is not None:
        one = candidate(variant, _weights(search, weight))
        made = made_before(context, one.variant)
        measured, own = eval_set.find(made.weights) if made else None, losses_of(context, one)
        if measured is None or own is None:
            return _State(losses, evaluated, windows, weight)
        found = perplexities_of(measured)
        evaluated[weight] = (found[GENERAL], found[search.domain])
        nll = _on_validation(measured)[GENERAL].window_nll
        assert nll is not None, "a perplexity has the likelihoods of its windows"
        windows[weight] = nll
        losses[weight] = (own[GENERAL], own[search.domain])
    return _State(losses, evaluated, windows, None)


def _at(search: Search) -> int:
    return search.corpora.index(search.domain)


def _weights(search: Search, domain: float) -> Weights:
    return (1.0 - domain, domain) if _at(search) == 1 else (domain, 1.0 - domain)


def _in_order(search: Search, pair: tuple[float, ...]) -> tuple[float, ...]:
    """Convert from the order of the search's corpora to (general, domain), or back."""
    return pair if _at(search) == 1 else pair[::-1]
