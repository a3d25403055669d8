"""The report page: for every shape of run complete, self-contained, without scripts and reproducible."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crosscal.errors import UsageError
from crosscal.report import ResultRow, write_report
from crosscal.report.groups import groups_of
from crosscal.report.headline import domains_of
from crosscal.report.layer_plots import layer_losses
from tests.helpers.made_up_run import kept_dense, layer, on_both_splits, result, sweep, windows_of, write_run

EVIL = '<script>alert("$x_1$")</script>'


def accuracies(rows: list[ResultRow]) -> list[ResultRow]:
    """Return a task's row for each variant."""
    firsts = {row.variant: row for row in rows}.values()
    return [
        result(
            row.variant,
            method=row.method,
            setting=row.setting,
            mixture=row.mixture,
            seed=row.seed,
            corpus_or_task="facts",
            metric="acc",
            value=0.4,
            stderr=0.05,
        )
        for row in firsts
    ]


def all_layers(rows: list[ResultRow]) -> list:
    variants = dict.fromkeys(row.variant for row in rows if row.method != "dense")
    inside = [
        layer(variant, block, matrix, dead_inputs=block, fallback="keep-dense" if block == 1 else None)
        for variant in variants
        for block in range(2)
        for matrix in ("self_attn.q_proj", "mlp.down_proj")
    ]
    return [*inside, *(layer(variant, None, "lm_head") for variant in variants)]


def self_calibrated(count: int = 4) -> list[ResultRow]:
    """A run calibrated on the model's own text, a domain and random tokens; legal and general are measured."""
    mixtures = [{"self": 1.0}, {"self": 0.5, "legal": 0.5}, {"legal": 1.0}, {"random": 1.0}][:count]
    variants = [("dense", {}), *((f"sparsegpt-70-m{number}", mixture) for number, mixture in enumerate(mixtures))]
    rows = [
        result(
            name,
            method="sparsegpt" if mixture else "dense",
            setting={"sparsity": 0.7} if mixture else {},
            mixture=mixture,
            corpus_or_task=corpus,
            value=25.0 + number + (3 - number if corpus == "legal" else 0.5 * number),
        )
        for number, (name, mixture) in enumerate(variants)
        for corpus in ("legal", "general")
    ]
    return on_both_splits(rows)


TEXTS = [
    {"corpus": corpus, "source": source, "text": f"text {number} of {corpus}"}
    for corpus, source in (("self", "self"), ("random", "random"), ("legal", "documents"))
    for number in range(2)
]
SWEEP = sweep()
MANY = sweep(
    settings=[("sparsegpt", {"sparsity": s / 40}) for s in range(10, 30)]
    + [(f"m{i}", {"bits": 2 + i}) for i in range(8)],
    alphas=[i / 8 for i in range(9)],
)
SHAPES: dict[str, tuple[list, list, dict]] = {
    "dense only": ([result()], [], {}),
    "one corpus": (sweep(corpora=("general",), alphas=(0.0,)), [], {}),
    "domain never measured": (sweep(corpora=("general",), domain="self"), [], {}),
    "no general corpus": (sweep(corpora=("biomedical",), alphas=(1.0,)), [], {}),
    "sweep without layers": (SWEEP, [], {}),
    "sweep": (SWEEP + accuracies(SWEEP), all_layers(SWEEP), {"stages": {"solve": 2.0}, "notes": ["3 rows rejected"]}),
    "seeds": (sweep(seeds=(0, 1, 2)), all_layers(sweep(seeds=(0, 1, 2))), {}),
    "other corpora": (sweep(corpora=("general", "biomedical", "wikitext2")), [], {}),
    "no data needed": ([*SWEEP, result("rtn", method="rtn", setting={"bits": 4}, value=90.0)], [], {}),
    "sparsities": (sweep(settings=[("wanda", {"sparsity": s}) for s in (0.5, 0.6, "2:4")]), [], {}),
    "no time passed": (SWEEP, [], {"commit": None, "stages": {"solve": 0.0}, "cache": {"hits": 0, "misses": 0}}),
    "one sample without a corpus": (SWEEP, [], {"samples": ["a text"], "versions": {"torch": "2.13.0"}}),
    "strange names": (
        [*sweep(corpora=("general", EVIL), domain=EVIL), result(EVIL), result("$x$ {{ 7 * 7 }} _y")],
        [layer(EVIL, 0, EVIL, fallback=EVIL)],
        {"notes": [EVIL], "samples": [{"corpus": EVIL, "text": EVIL}], "device": EVIL, "stages": {EVIL: 1.0}},
    ),
    "skipped task": ([result(), result(corpus_or_task="arc", value=None, stderr=None, skipped="no network")], [], {}),
    "self-calibration": (self_calibrated(), [], {"samples": TEXTS}),
    "several domains": ([*SWEEP, *sweep(domain="legal", corpora=("general", "biomedical", "legal"))], [], {}),
    "tasks only": (accuracies(SWEEP), all_layers(SWEEP), {}),
    "one variant": ([result(), result("only", method="rtn", setting={"bits": 4}, value=90.0)], [], {}),
    "all stay dense": (
        SWEEP,
        [kept_dense(row.variant, 0, "mlp.up_proj") for row in SWEEP if row.method != "dense"],
        {},
    ),
    "nothing was measured": ([result(value=None, stderr=None, skipped="no network")], [], {}),
    "a broken model": (
        [*SWEEP, result("broken", method="gptq", setting={"bits": 4}, value=3.2e13, stderr=1e12)],
        [],
        {},
    ),
    "hundreds": (MANY + accuracies(MANY), [], {}),
}


class Page(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", set(), []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_run(tmp_path: Path, shape: str) -> None:
    results, layers, run = SHAPES[shape]
    path = write_report(write_run(tmp_path, results, layers, **run))
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for row in results:
        assert row.variant in page.text
        assert row.corpus_or_task in page.text
    assert all(link.startswith(("#", "data:image/png;")) for link in page.links)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img"}
    assert not re.search(r"@import|url\((?!['\"]?#)", text)
    assert "None" not in page.text
    assert "nan" not in re.findall(r"[a-z]+", page.text)


def taken(text: str) -> list[list[str]]:
    """Return the rows of "What to take", cell by cell."""
    _, _, rest = text.partition("<h2>What to take</h2>")
    rows = re.findall(r"<tr><td>.*?</tr>", rest.partition("<h2>")[0], re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows
    ]


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        *((shape, True) for shape in SHAPES if shape not in ("hundreds", "strange names")),
        *((shape, False) for shape in ("sweep", "seeds", "sparsities")),
    ],
)
def test_whatever_the_run_what_to_take_is_said_with_numbers_or_not_at_all(
    tmp_path: Path, shape: str, kept: bool
) -> None:
    results, layers, run = SHAPES[shape]
    names = {row.variant for row in results}
    windows = windows_of(results) if kept else []
    text = write_report(write_run(tmp_path, results, layers, windows, sorted(names), **run)).read_text(encoding="utf-8")
    rows = taken(text)
    sentences = [said for said in re.findall(r"<li>For .*?</li>", text) if " take " in said]
    assert len(rows) == len(sentences)
    for row, said in zip(rows, sentences, strict=True):
        domain, variant, special = row[0], row[2], row[-3]
        assert re.match(r"[\d.]+ ± [\d.]+", special)
        assert f"For {domain}" in said
        assert special in said
        assert f"models/{variant}" in said
        assert any(row.corpus_or_task == domain and row.value is not None for row in results)
    assert ("What to take" in text) == bool(domains_of(groups_of(results, [])))


def test_every_variant_that_was_measured_is_drawn_whatever_it_was_calibrated_on(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path, self_calibrated())).read_text(encoding="utf-8")
    assert "General against legal" in text
    assert "General against self" not in text
    (chart,) = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for word in ("self", "0.5 self + 0.5 legal", "1", "random"):
        assert f">{word}</text>" in chart


def test_calibration_text_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    text = Page(write_report(write_run(tmp_path / "a", SWEEP, samples=TEXTS)).read_text(encoding="utf-8")).text
    for said in ("self: written by the model itself", "random: random tokens", "legal: from its documents"):
        assert said in text
    assert "text 0 of legal" in text
    assert "3 more are in samples.json" in text
    older = [{"corpus": "legal", "text": "It is written."}]
    text = Page(write_report(write_run(tmp_path / "b", SWEEP, samples=older)).read_text(encoding="utf-8")).text
    assert "It is written." in text
    assert "the model" not in text.partition("Calibration text")[2].partition("Circumstances")[0]


def test_losses_are_compared_over_the_same_matrices() -> None:
    """A matrix without a held-out loss is in neither line, and blank on the map of held-out losses."""
    name = "sparsegpt0-biomedical-a1"
    known = [layer(name, block, matrix) for block in range(2) for matrix in ("a", "b")]
    unknown = layer(name, 0, "c", relative_loss=9.0, heldout_relative_loss=None)
    dense = kept_dense(name, 0, "d")
    assert layer_losses([*known, unknown, dense], [name], {}) != layer_losses(known, [name], {}), "they have a row"
    larger = dataclasses.replace(unknown, relative_loss=900.0)
    assert layer_losses([*known, unknown, dense], [name], {}) == layer_losses([*known, larger, dense], [name], {})


def test_the_matrices_that_lose_most_are_solved_ones(tmp_path: Path) -> None:
    name = "sparsegpt0-biomedical-a1"
    rows = [layer(name, 0, "solved", heldout_relative_loss=0.0), kept_dense(name, 0, "dense", relative_loss=0.0)]
    text = write_report(write_run(tmp_path, SWEEP, rows)).read_text(encoding="utf-8")
    worst = text.partition("most, over all variants")[2].partition("</details>")[0]
    assert "solved" in worst
    assert "model.layers.0.dense" not in worst
    assert "1 matrix that loses" in text.replace("The 1 matrix", "1 matrix")


@pytest.mark.parametrize("shape", ["sweep", "seeds", "strange names"])
def test_the_same_files_give_the_same_bytes(tmp_path: Path, shape: str) -> None:
    results, layers, run = SHAPES[shape]
    first, second = (write_run(tmp_path / name, results, layers, **run) for name in "ab")
    assert write_report(first).read_bytes() == write_report(second).read_bytes()
    assert write_report(first).read_bytes() == write_report(second).read_bytes()


def test_it_says_what_happened(tmp_path: Path) -> None:
    run = {
        "stages": {"moments": 90.0, "solve": 30.5},
        "cache": {"hits": 3, "misses": 1},
        "calibration_tokens_read": 65536,
        "peak_rss_bytes": 2_340_000_000,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "commit": "abc123",
        "notes": ["12 rows rejected"],
        "samples": [{"corpus": "law", "text": "It is written."}],
    }
    skipped = result(corpus_or_task="arc", value=None, stderr=None, skipped="no network")
    folder = write_run(tmp_path, [*SWEEP, skipped], all_layers(SWEEP), **run)
    (folder / "plan.yaml").write_text("model: models/<tiny>\n", encoding="utf-8")
    text = re.sub(r"\s+", " ", Page(write_report(folder).read_text(encoding="utf-8")).text)
    for expected in (
        "3 of 4 sets of layer statistics came from the store",
        "65,536 calibration tokens",
        "1 min 30 s",
        "2.34 GB",
        "torch 2.13.0",
        "abc123",
        "12 rows rejected",
        "It is written.",
        "arc was skipped: no network",
        "12 matrices left dense",
        "model: models/<tiny>",
        "6 compressed variants evaluated",
    ):
        assert expected in text


def test_charts_too_large_say_what_they_leave_out(tmp_path: Path) -> None:
    results, layers, run = SHAPES["hundreds"]
    text = Page(write_report(write_run(tmp_path, results, layers, **run)).read_text(encoding="utf-8")).text
    assert "Drawn are only 5 of 28 levels by themselves, 6 of 9 methods, 6 of 9 values of α in the curves" in text
    assert "the dense model and 23 variants" in text


def test_a_variant_that_cannot_be_drawn_is_in_the_table_and_said_to_be_missing(tmp_path: Path) -> None:
    both = result("both", method="sparsegpt", setting={"sparsity": 0.5}, mixture={"biomedical": 0.5, "legal": 0.5})
    text = Page(write_report(write_run(tmp_path, [*SWEEP, both])).read_text(encoding="utf-8")).text
    assert "0.5 biomedical + 0.5 legal" in text
    assert "1 of 7 variants lack one of the two perplexities." in text


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(write_run(tmp_path, SWEEP))
    assert dict(matplotlib.rcParams) == before


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no results\.jsonl here"):
        write_report(tmp_path)
    write_run(tmp_path, SWEEP)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json: not JSON"):
        write_report(tmp_path)
