"""The HTML report of a run: one page without scripts or external resources, the same bytes for the same files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscal.evaluation import PERPLEXITY, TEST
from crosscal.files import write_whole
from crosscal.report.calibration import overlap_sentence, quality_table, site_rows, verdicts, warnings
from crosscal.report.curves import curves
from crosscal.report.figure import COLOURS
from crosscal.report.found_mixtures import found_mixtures
from crosscal.report.groups import GENERAL, Column, SeedGroup, axes_of, choosing_columns, columns_of
from crosscal.report.headline import RULE, Recommendation, best_variants, domains_of, sentences_of
from crosscal.report.layer_plots import layer_losses
from crosscal.report.left_dense import common_text, marks_of
from crosscal.report.numbers import Number, number_text, percent_text, short_text
from crosscal.report.plots import MOST_ROWS, accuracies, left_out, trade_off
from crosscal.report.questions import answer_changes, answers_of
from crosscal.report.rows import NOT_EVALUATED, LayerRow
from crosscal.report.run_files import CalibrationText, RunFiles, read_run
from crosscal.report.study_page import study_section
from crosscal.report.sufficiency import gap_sentences
from crosscal.report.table import TEXT_COLUMNS, mixture_text, summary_table

if TYPE_CHECKING:
    from jinja2 import Template

MOST_LAYER_VARIANTS = 4
MOST_LEFT_DENSE = 200
"""Listed one by one; the page states how many more there are."""
MOST_SAMPLES = 8
SOURCES = {"documents": "from its documents", "self": "written by the model itself", "random": "random tokens"}


@dataclass(frozen=True)
class DomainSection:
    domain: str
    best: list[Recommendation]
    sentences: list[str]
    charts: list[str]
    """SVG text."""
    left_out: str


def write_report(run_dir: Path) -> Path:
    """Read a run directory, write its `report.html` atomically, and return the path."""
    path = run_dir / "report.html"
    write_whole(path, render(read_run(run_dir)))
    return path


def render(files: RunFiles) -> str:
    """Return the page as text."""
    return _template().render(**_context(files))


@cache
def _template() -> Template:
    """Compiled once per process."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number_text, short=short_text, share=percent_text, mixture=mixture_text)
    environment.filters.update(duration=_duration, size=_size)
    return environment.get_template("report.html.j2")


def _context(files: RunFiles) -> dict[str, Any]:
    groups, columns = files.groups, columns_of(files.results)
    sections = [_domain_section(groups, columns, domain, files.models) for domain in domains_of(groups)]
    shown, taken = _layer_variants(groups, sections)
    left_dense = [row for row in files.layers if row.stays_dense]
    skipped = [(row, row.skipped) for row in files.results if row.skipped]
    return {
        "models": sorted({row.model for row in files.results}),
        "variants": len({variant for group in groups if not group.is_dense for variant in group.variants}),
        "dense": _dense_perplexities(groups),
        "sections": sections,
        "rule": RULE,
        "study": study_section(files.study, groups),
        "found": found_mixtures(files.run, groups),
        "curves_without_domain": [] if sections else _curve_charts(groups, None, _perplexity_corpora(columns)),
        "table": summary_table(groups, [*columns, *choosing_columns(files.results)]),
        "text_columns": TEXT_COLUMNS,
        "seeds_of": {group.name: group.variants for group in groups if len(group.variants) > 1},
        "layer_chart": layer_losses(files.layers, shown, _marks_of_variants(groups)),
        "layer_variants": (len(shown), len({row.variant for row in files.layers})),
        "layers_of_taken": bool(shown) and set(shown) <= taken,
        "worst_layers": _worst_layers(files.layers),
        "accuracy_chart": accuracies(_taken_first(groups, sections), columns),
        "accuracy_limit": MOST_ROWS if len(groups) > MOST_ROWS else None,
        "answer_changes": answer_changes(
            _taken_first(groups, sections), [one for each in sections for one in each.best], answers_of(files.questions)
        ),
        "stages": _stages(files.run),
        "colours": COLOURS,
        "skipped": sorted({(row.corpus_or_task, why) for row, why in skipped if not why.startswith(NOT_EVALUATED)}),
        "not_evaluated": list(dict.fromkeys((r.variant, why) for r, why in skipped if why.startswith(NOT_EVALUATED))),
        "left_dense": left_dense[:MOST_LEFT_DENSE],
        "left_dense_count": len(left_dense),
        "left_dense_of": [(group.name, group.left_dense.text) for group in groups if group.left_dense.matrices],
        "common": common_text(groups),
        "dead_inputs": _dead_inputs(files.layers),
        "run": files.run,
        "notes": [str(note) for note in files.run.get("notes") or []],
        "samples": _one_of_each(files.samples)[:MOST_SAMPLES],
        "more_samples": max(0, len(files.samples) - len(_one_of_each(files.samples)[:MOST_SAMPLES])),
        "sources": SOURCES,
        "text_table": quality_table(files.run),
        "text_sites": site_rows(files.run),
        "text_warnings": warnings(files.run),
        "text_overlap": overlap_sentence(files.run),
        "text_verdicts": verdicts(files.run) or gap_sentences(files.results, files.layers),
        "plan": files.plan,
    }


def _domain_section(
    groups: Sequence[SeedGroup], columns: Sequence[Column], domain: str, kept: Collection[str]
) -> DomainSection:
    corpora = _perplexity_corpora(columns)
    others = [corpus for corpus in corpora if corpus not in (GENERAL, domain) and corpus not in domains_of(groups)]
    measured = [corpus for corpus in (GENERAL, domain) if corpus in corpora] + others
    charts = [trade_off(groups, domain), *_curve_charts(groups, domain, measured)]
    best, sentences = best_variants(groups, domain), sentences_of(groups, domain, kept)
    return DomainSection(domain, best, sentences, [chart for chart in charts if chart], left_out(groups, domain))


def _curve_charts(groups: Sequence[SeedGroup], domain: str | None, corpora: Sequence[str]) -> list[str]:
    charts = [curves(groups, domain, corpora, axis) for axis in axes_of(groups)] if corpora else []
    return [chart for chart in charts if chart]


def _perplexity_corpora(columns: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(name for name, split, metric in columns if (split, metric) == (TEST, PERPLEXITY)))


def _dense_perplexities(groups: Sequence[SeedGroup]) -> list[tuple[str, Number]]:
    dense = [item for group in groups if group.is_dense for item in group.numbers.items()]
    return [(name, number) for (name, split, metric), number in dense if (split, metric) == (TEST, PERPLEXITY)]


def _layer_variants(groups: Sequence[SeedGroup], sections: Sequence[DomainSection]) -> tuple[list[str], set[str]]:
    """Variants with solved matrices: per domain the recommended one with the highest domain perplexity, then the first
    ones, up to the limit; and which of all variants were recommended there."""
    best = [
        max(section.best, key=lambda found: found.chosen_by[0].value if found.chosen_by[0] else 0.0).group
        for section in sections
        if section.best
    ]
    chosen = [group.variants[0] for group in [*best, *groups] if group.relative_loss is not None]
    shown = list(dict.fromkeys(chosen))[: min(MOST_LAYER_VARIANTS, len(sections) or 2)]
    return shown, {group.variants[0] for group in best}


def _marks_of_variants(groups: Sequence[SeedGroup]) -> dict[str, str]:
    marks = marks_of(groups)
    return {variant: marks[group.name] for group in groups if group.name in marks for variant in group.variants}


def _one_of_each(samples: Sequence[CalibrationText]) -> list[CalibrationText]:
    """The first sample of every corpus."""
    return list({sample.corpus: sample for sample in reversed(samples)}.values())[::-1]


def _taken_first(groups: Sequence[SeedGroup], sections: Sequence[DomainSection]) -> list[SeedGroup]:
    """The dense model, the groups recommended for some domain, then the others."""
    taken = {best.group.name for section in sections for best in section.best}
    return sorted(groups, key=lambda group: (not group.is_dense, group.name not in taken))


def _worst_layers(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """The ten solved matrices with the largest loss: held-out if any has one, else on the calibration data; none if no
    loss was measured."""
    solved = [row for row in layers if not row.stays_dense]
    measured = [row for row in solved if row.heldout_relative_loss is not None]
    if measured:
        return sorted(measured, key=lambda row: -(row.heldout_relative_loss or 0.0))[:10]
    known = [row for row in solved if row.relative_loss is not None]
    return sorted(known, key=lambda row: -(row.relative_loss or 0.0))[:10]


def _dead_inputs(layers: Sequence[LayerRow]) -> list[tuple[str, int]]:
    """Matrices with inputs that were zero on all calibration tokens: (name, most dead inputs of any variant)."""
    most: dict[str, int] = {}
    for row in layers:
        if row.dead_inputs:
            most[row.layer] = max(row.dead_inputs, most.get(row.layer, 0))
    return list(most.items())


def _stages(run: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(stage, seconds, percent of all stages)."""
    stages = run.get("stages") or {}
    total = sum(stages.values()) or 1.0
    return [(name, seconds, 100 * seconds / total) for name, seconds in stages.items()]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
