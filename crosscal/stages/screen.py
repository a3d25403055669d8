"""`evaluate: screen`: skip the evaluation of variants that another one of their level clearly beats in layer losses.

Variants of one level of compression and one seed that solved the same matrices are compared on held-out text of every
corpus that the run calibrates on. Variants that differ in seed alone are skipped only together, if each of them is
beaten. A variant with sequential inputs has no such losses and is always evaluated.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from crosscal.report.rows import NOT_EVALUATED, LayerRow
from crosscal.search.screen import MARGIN, ruled_out
from crosscal.variants import Variant


def screened(
    variants: Sequence[Variant], rows_of: Mapping[str, Sequence[LayerRow]], spared: Collection[str] = ()
) -> dict[str, str]:
    """Return variant -> why it is not evaluated. The variants in `spared` are evaluated whatever their losses, and so
    are those that differ from them in seed alone."""
    alike: dict[object, dict[str, dict[str, float]]] = defaultdict(dict)
    for variant in variants:
        solved = [row for row in rows_of[variant.name] if not row.stays_dense]
        if solved and all(row.corpus_losses is not None for row in solved):
            alike[level_of(variant, solved), variant.seed][variant.name] = _means(solved)
    found = {}
    for losses in alike.values():
        for name, better in ruled_out(losses).items():
            found[name] = _reason(losses[name], losses[better], better)
    kept = {without_seed(v) for v in variants if v.name not in found or v.name in spared}
    return {v.name: found[v.name] for v in variants if without_seed(v) not in kept}


def without_seed(variant: Variant) -> str:
    """Return a name that variants share if they differ in seed alone."""
    return variant.name.removesuffix(f"-s{variant.seed}")


def level_of(variant: Variant, solved: Sequence[LayerRow]) -> object:
    """Return a key that comparable variants share: equal amounts of compression of the same matrices."""
    return tuple(amount.text for amount in variant.amounts), frozenset(row.layer for row in solved)


def _means(solved: Sequence[LayerRow]) -> dict[str, float]:
    """Return corpus -> mean loss over matrices."""
    of_corpora: dict[str, list[float]] = defaultdict(list)
    for row in solved:
        for corpus, loss in (row.corpus_losses or {}).items():
            of_corpora[corpus].append(loss)
    return {corpus: statistics.fmean(losses) for corpus, losses in of_corpora.items()}


def _reason(own: Mapping[str, float], other: Mapping[str, float], better: str) -> str:
    losses = ", ".join(f"{corpus} {own[corpus]:.3g} against {other[corpus]:.3g}" for corpus in own)
    return f"{NOT_EVALUATED}{better} loses at least {MARGIN:.0%} less on every corpus ({losses})"
