"""Calibration text as a run's record describes it: quality measures, warnings, and whether there is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MEASURES = {
    "tokens": "tokens",
    "documents": "documents",
    "unique_documents": "unique",
    "repeated_tokens": "repeated tokens",
    "ngram_diversity": "n-gram diversity",
    "zipf_coefficient": "Zipf coefficient",
    "vocabulary_coverage": "vocabulary",
    "perplexity": "perplexity",
}
SHARES = {"repeated_tokens", "vocabulary_coverage"}
SITE_FACTS = ("inputs", "tokens", "effective_rank", "condition")
NO_NUMBER = "–"


def quality_table(run: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headers and one row per corpus; no rows for records of earlier versions."""
    corpora: Mapping[str, Any] = run.get("calibration_quality") or {}
    shown = [name for name in MEASURES if any(measured.get(name) is not None for measured in corpora.values())]
    rows = [[corpus, *(_cell(name, measured.get(name)) for name in shown)] for corpus, measured in corpora.items()]
    return ["corpus", *(MEASURES[name] for name in shown)], rows


def warnings(run: Mapping[str, Any]) -> list[str]:
    """Return warnings: text that is hardly worth calibrating on, leaks that the plan allows, and experts with too few
    tokens."""
    corpora: Mapping[str, Any] = run.get("calibration_quality") or {}
    found = [f"{corpus}: {why}." for corpus, measured in corpora.items() for why in measured.get("faults") or []]
    return [*found, *_leaks(run.get("overlap") or {}), *_starved(run.get("starved_experts") or {})]


def verdicts(run: Mapping[str, Any]) -> list[str]:
    """Return one sentence per corpus on whether there is enough of it."""
    return [verdict_sentence(curve) for curve in run.get("sufficiency") or []]


def verdict_sentence(curve: Mapping[str, Any]) -> str:
    if curve["last_gain"] is None:
        return f"{curve['corpus']}: too few windows to judge whether there is enough text."
    halves = f"the last doubling, to {curve['points'][-1]['tokens']:,} tokens, changed held-out loss by"
    changes = f"{halves} {-curve['last_gain']:+.1%}; the next one is expected to bring {-curve['expected_gain']:+.1%}"
    return f"{curve['corpus']}: {curve['verdict']}; {changes}."


def site_rows(run: Mapping[str, Any]) -> list[list[str]]:
    """Return corpus, site, inputs, tokens, effective rank and condition number of the inspected sites."""
    return [
        [curve["corpus"], site["name"], *(_cell(name, site[name]) for name in SITE_FACTS)]
        for curve in run.get("sufficiency") or []
        for site in curve["sites"]
    ]


def overlap_sentence(run: Mapping[str, Any]) -> str:
    """Return the share of evaluation text that occurs in calibration text; empty if it was not compared."""
    found = run.get("overlap") or {}
    sets = [each for each in found.get("sets") or [] if each["texts"] > each["too_short"]]
    if not sets:
        return ""
    shares = ", ".join(f"{each['set']} {each['share_of_words']:.1%}" for each in sets)
    return f"Words of evaluation text in {found['ngram_words']}-grams of calibration text: {shares}."


def _leaks(overlap: Mapping[str, Any]) -> Iterator[str]:
    for each in overlap.get("sets") or []:
        if each["leaked"]:
            found = f"{each['leaked']:,} of {each['texts']:,} texts occur in the calibration text"
            limit = f"{overlap['leak_share']:.0%} or more of their words"
            usual = (
                "" if each["is_leak"] else ", no more often than training documents are near-duplicates of one another"
            )
            yield f"{each['set']}: {found} ({limit}){usual}; results on them are optimistic."


def _starved(starved: Mapping[str, Any]) -> Iterator[str]:
    for corpus, found in starved.items():
        share = f"{found['starved']:,} of {found['experts']:,} experts' inputs saw fewer tokens than they are wide"
        least = f"{found['least']}: {found['least_tokens']:,} tokens of {found['least_inputs']:,}"
        yield f"{corpus}: {share} (least, {least}); draw more windows."


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return NO_NUMBER
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if name in SHARES else f"{value:.3g}"
