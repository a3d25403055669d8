"""The embedded demo's model through the flow: which model of an alpha sweep is published, whatever the test numbers."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscal.corpora import ingest
from crosscal.evaluation import TEST, Measurement
from crosscal.flows.pipeline import versions_of
from crosscal.flows.recompress import recompress
from crosscal.landing import Ledger
from crosscal.plan import load_plan
from crosscal.publication import Published, publish_model
from crosscal.report.headline import best_variants
from crosscal.report.rows import ResultRow, WindowRow, read_rows, write_rows
from crosscal.report.run_files import read_run
from crosscal.store import Store
from crosscal.tasks import publication
from crosscal.tasks.run_spec import RunSpec

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[1] / "data" / "demo"
DOMAIN = "biomedical"
ALPHAS = [f"sparsegpt-70-{DOMAIN}-a0.1", f"sparsegpt-70-{DOMAIN}-a0.5", f"sparsegpt-70-{DOMAIN}"]
PLAN = {
    "model": str(DEMO / "model"),
    "corpora": {"general": str(DEMO / "corpora" / "general"), "$domain": {}},
    "calibration": {"windows": 16, "length": 128, "held_out_windows": 2},
    "compress": [{"method": "sparsegpt", "sparsity": 0.7, "domain": "$domain", "alpha": [0.1, 0.5, 1]}],
    "evaluate": {"windows": 8, "validation_windows": 16},
    "execution": {"device": "cpu"},
    "publish": {"domain": "$domain", "guard": {"general": 0.3}},
}


@dataclasses.dataclass(frozen=True)
class Done:
    folder: Path
    record: dict[str, Any]

    @property
    def plan(self) -> Path:
        return self.folder / "plan.yaml"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def run_dir(self) -> Path:
        return Path(self.record["run_dir"])

    def decide(self, pointer: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
        """Decide again about the run's models, for a pointer of another name."""
        plan, known = load_plan(self.plan, overrides, DOMAIN), self.record["record"]
        found = {name: known[name] for name in ("model", "device", "dtype")}
        versions = versions_of(known["corpora"])
        spec = RunSpec(plan.model_dump(mode="json"), str(self.home), versions=versions, run_dir=str(run_dir), **found)
        stored = {name: corpus["stored"] for name, corpus in known["corpora"].items()}
        decided = publication.decide_publication.fn(spec, stored, pointer, 1, "by-hand")
        return {name: value for name, value in decided.items() if name != "run_dir"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("published")
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    store = Store(folder / "home")
    version = ingest(store, DOMAIN, [str(DEMO / "corpora" / DOMAIN)]).corpus.version
    Ledger(store).request(DOMAIN, version)
    record = recompress.fn(str(folder / "plan.yaml"), [], str(folder / "home"), str(folder / "runs"), DOMAIN)
    return Done(folder, record["runs"][0])


def test_a_middle_alpha_is_published_under_a_guard_that_the_highest_breaks(done: Done) -> None:
    files = read_run(done.run_dir)
    general, special = (
        {
            row.variant: row.value or 0.0
            for row in files.results
            if (row.corpus_or_task, row.split) == (corpus, "validation")
        }
        for corpus in ("general", DOMAIN)
    )
    assert min(ALPHAS, key=lambda name: special[name]) == ALPHAS[-1], "the highest alpha is the best on the domain"
    assert general[ALPHAS[-1]] > 1.3 * general["dense"]
    assert (done.record["outcome"], done.record["variant"]) == ("published", ALPHAS[1])
    assert f"{ALPHAS[1]} is the best on {DOMAIN} of 2 candidates" in done.record["reason"]
    current = Published(Store(done.home)).current(DOMAIN)
    assert current is not None
    assert (current.model, current.facts["variant"]) == (done.record["model"], ALPHAS[1])
    reported = {row.corpus_or_task: row.value for row in files.results if (row.variant, row.split) == (ALPHAS[1], TEST)}
    assert done.record["perplexity"] == {"candidate": reported, "published": None}


def test_if_none_keeps_the_guard_the_nearest_is_named_and_one_named_by_the_plan_is_held_to_it(done: Done) -> None:
    kept = done.decide("strict", done.run_dir, "publish.guard.general=0.01")
    assert kept["outcome"] == "kept"
    assert f"none of 3 candidates keeps the guard; nearest comes {ALPHAS[0]}: general worse by" in kept["reason"]
    named = done.decide("named", done.run_dir, f"publish.variant={ALPHAS[-1]}")
    assert (named["outcome"], named["variant"]) == ("kept", ALPHAS[-1])
    assert f"{ALPHAS[-1]} does not keep the guard" in named["reason"]
    assert Published(Store(done.home)).domains() == [DOMAIN]


@pytest.mark.parametrize("earlier", [None, ALPHAS[0], ALPHAS[1]])
def test_no_test_number_enters_a_decision(
    done: Done, earlier: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test numbers of the run are inverted, and those of the published model, which are in the store, replaced."""
    for pointer in ("clean", "poisoned"):
        point_to(done, earlier, f"{pointer}-{earlier}".lower())
    clean = done.decide(f"clean-{earlier}".lower(), done.run_dir)
    other = tmp_path / "run"
    shutil.copytree(done.run_dir, other)
    poison(other)
    measure = publication.measure

    def poisoned(*args: Any, **kwargs: Any) -> list[Measurement]:
        found = measure(*args, **kwargs)
        return [
            dataclasses.replace(one, value=1.0, window_nll=(0.0,) * 8) if one.split == TEST else one for one in found
        ]

    monkeypatch.setattr(publication, "measure", poisoned)
    after = done.decide(f"poisoned-{earlier}".lower(), other)
    assert after["perplexity"] != clean["perplexity"]
    reported = ("perplexity", "at")
    assert {n: v for n, v in after.items() if n not in reported} == {
        n: v for n, v in clean.items() if n not in reported
    }
    assert clean["outcome"] == ("kept" if earlier == ALPHAS[1] else "published")
    if earlier == ALPHAS[1]:
        assert "not distinguishable from the published model" in clean["reason"]
    one, two = (best_variants(read_run(folder).groups, DOMAIN) for folder in (done.run_dir, other))
    assert [best.group.name for best in one] == [best.group.name for best in two]


def point_to(done: Done, variant: str | None, pointer: str) -> None:
    if variant is not None:
        store = Store(done.home)
        key = publish_model(store, done.run_dir / "models" / variant, {})
        Published(store).move(pointer, None, {"model": key, "corpus_version": 1, "variant": variant})


def poison(run_dir: Path) -> None:
    """Invert the order of the variants' test perplexities, and replace their test windows by random numbers."""
    chance = random.Random(0)
    results, windows = run_dir / "results.jsonl", run_dir / "windows.jsonl"
    write_rows(results, [
        dataclasses.replace(row, value=1000 / (row.value or 1)) if row.split == TEST else row
        for row in read_rows(results, ResultRow)
    ])  # fmt: skip
    write_rows(windows, [
        dataclasses.replace(row, nll=[chance.uniform(0, 9) for _ in range(5)]) if row.split == TEST else row
        for row in read_rows(windows, WindowRow)
    ])  # fmt: skip
