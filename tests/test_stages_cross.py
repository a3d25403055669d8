"""Moments over pairs of dense and compressed inputs: storage, reuse, mixing, losses, refusals; and a `qep` run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.compressors import COMPRESSORS, Site, Statistic
from crosscal.errors import PlanError
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.plan import parse_plan
from crosscal.progress import silent
from crosscal.report.rows import LayerRow, read_rows
from crosscal.stages import compress
from crosscal.stages.block_problem import BlockProblem
from crosscal.stages.compress import RunContext, compress_sequential, layer_rows, publish_variant
from crosscal.stages.moments import CachedMoments
from crosscal.stages.preflight import BlockShape, moments_bytes, reading_bytes, solving_bytes
from crosscal.stages.spill import spill_folder
from crosscal.statistics import EVERY, OF_TWO_STREAMS, VECTORS, Mixture
from crosscal.store import Store
from crosscal.tasks.refusals import unpaired
from crosscal.variants import RecipeStep, Variant, variants
from tests.helpers.tiny_models import load_plain
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_run import run_context, sample, tiny_source, windows
from tests.helpers.written_models import contents, rows_without_times
from tests.test_models_cross import plain_inputs

MIXED = Mixture.of({"general": 0.25, "legal": 0.75})
ROUNDOFF_F32 = 2e-4
SITES = 8


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests do not cover power failures."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny_source(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def recipe(name: str, *steps: tuple[str, dict[str, Any]], **more: Any) -> Variant:
    placed = tuple(RecipeStep(method, tuple(settings.items())) for method, settings in steps)
    return Variant(name, placed, MIXED, "sequential", 0, more.get("trace_normalised", False))


GPTQ = ("gptq", {"bits": 3, "group_size": 32})
QEP = ("qep", {"propagation": 0.5, "damping": 1.0})
PLAIN, CORRECTED = recipe("plain", GPTQ), recipe("corrected", QEP, GPTQ)
NORMALISED = recipe("normalised", QEP, ("sparsegpt", {"sparsity": 0.6}), trace_normalised=True)


def context_of(folder: Path, store: Store, source: ModelSource) -> RunContext:
    general = sample(store, "general", windows(10, seed=1))
    legal = sample(store, "legal", windows(6, seed=2, high=100), windows(4, seed=3, high=50))
    return run_context(folder, store, source, general, legal)


def solved(context: RunContext, each: Variant):
    done = compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)
    return done


def cached_of(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> list[CachedMoments]:
    """Return a list that collects the stored moments of each sequential variant that is solved later."""
    found: list[CachedMoments] = []
    walk = compress.InMemoryMoments.of
    monkeypatch.setattr(compress.InMemoryMoments, "of", lambda cached, seen: found.append(cached) or walk(cached, seen))
    return found


# --- storage and reuse -----------------------------------------------------------------------------------------------


def test_cross_moments_are_separate_artifacts_stored_only_if_needed(store: Store, source: ModelSource) -> None:
    context = context_of(Path(store.location).parent / "run", store, source)
    solved(context, PLAIN)
    sets = sum(len(each.sets) for each in context.samples.values())
    sums = [artifact.provenance["sums"] for artifact in store.list("moments")]
    assert sorted(sums) == sorted([["gram"], [w for w in Statistic if w in VECTORS]] * SITES * sets)
    solved(context, CORRECTED)
    sums = [artifact.provenance["sums"] for artifact in store.list("moments")]
    assert len(sums) == (2 + 3) * SITES * sets
    assert sums.count(["cross", "drift"]) == SITES * sets
    assert all(problem is None for _, _, problem in store.verify())


@pytest.mark.parametrize("each", [CORRECTED, NORMALISED], ids=lambda each: each.name)
def test_a_model_made_again_reads_nothing_and_is_the_same(
    tmp_path: Path, store: Store, source: ModelSource, each: Variant
) -> None:
    first = context_of(tmp_path / "first", store, source)
    tokens = sum(of.tokens for of in first.samples.values())
    assert solved(first, each).tokens_read == tokens
    assert solved(context_of(tmp_path / "second", store, source), each).tokens_read == 0
    assert contents(tmp_path / "first" / "models") == contents(tmp_path / "second" / "models")
    assert rows_without_times(tmp_path / "first") == rows_without_times(tmp_path / "second")


def test_a_killed_run_goes_on_to_the_same_model(
    tmp_path: Path, store: Store, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved(context_of(tmp_path / "undisturbed", Store(tmp_path / "another home"), source), CORRECTED)
    context, write = context_of(tmp_path / "killed", store, source), compress._write

    def die(context: RunContext, one: Variant, problem: BlockProblem, *args: Any) -> None:
        if problem.block == 1:
            raise KeyboardInterrupt
        write(context, one, problem, *args)

    monkeypatch.setattr(compress, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        solved(context, CORRECTED)
    monkeypatch.setattr(compress, "_write", write)
    for artifact in store.list("moments"):
        if artifact.provenance["block"] == 1:
            store.discard("moments", artifact.key)
    assert solved(context, CORRECTED).tokens_read > 0
    assert contents(tmp_path / "killed" / "models") == contents(tmp_path / "undisturbed" / "models")
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "undisturbed")


# --- mixing and losses -----------------------------------------------------------------------------------------------


SEEN: dict[str, dict[Statistic, Tensor]] = {}


@dataclass(frozen=True)
class Spy:
    """Records the statistics of every site and changes nothing."""

    kind: ClassVar = "prune"
    needs: ClassVar = frozenset({Statistic.GRAM, Statistic.CROSS})
    version: ClassVar = 1

    def __call__(self, site: Site) -> Site:
        SEEN[site.layers[0].name] = {which: site.statistics[which].clone() for which in self.needs}
        return site


@pytest.mark.parametrize("normalised", [False, True])
def test_pairs_are_mixed_as_h_is(
    tmp_path: Path, store: Store, source: ModelSource, normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with float64 means computed here from the stored sums of every set."""
    monkeypatch.setitem(COMPRESSORS, "spy", Spy)
    SEEN.clear()
    context = context_of(tmp_path / "run", store, source)
    stored = cached_of(context, monkeypatch)
    each = recipe("spied", ("spy", {}), ("wanda", {"sparsity": 0.5}), trace_normalised=normalised)
    solved(context, each)
    for block in range(source.blocks):
        for site in stored[0].sites(block) or ():
            means: dict[str, dict[Statistic, Tensor]] = {}
            for corpus in MIXED.corpora:
                parts = context.samples[corpus, 0].calibration.parts
                read = [(part.weight, stored[0].read(part.key, block, site)) for part in parts]
                mass = sum(weight * moments.tokens for weight, moments in read)
                means[corpus] = {w: torch.stack([k * m[w].double() for k, m in read]).sum(0) / mass for w in Spy.needs}
            traces = {corpus: float(of[Statistic.GRAM].trace()) for corpus, of in means.items()}
            trace = sum(weight * traces[corpus] for corpus, weight in MIXED.weights)
            scale = {corpus: trace / traces[corpus] if normalised else 1.0 for corpus in traces}
            found = SEEN[f"{source.block_name(block)}.{site.matrices[0].name}"]
            for which in Spy.needs:
                mixed_II = torch.stack([w * scale[corpus] * means[corpus][which] for corpus, w in MIXED.weights]).sum(0)
                bound = 1e-5 * float(mixed_II.abs().max())
                torch.testing.assert_close(found[which].double(), mixed_II, rtol=0, atol=bound)


def true_losses(context: RunContext, each: Variant, *, held_out: bool) -> dict[str, float]:
    """E‖W x - V y‖² / E‖W x‖² in float64, from forward passes of two plain models over the windows.

    A block's inputs y come from a model that is compressed before this block and dense in it, as when it was solved.
    """
    dense, model = load_plain(context.source.path), load_plain(context.source.path)
    written = load_variant(context.folder / "models" / each.name).double().state_dict()
    sums: dict[str, list[float]] = {}
    for block in range(context.source.blocks):
        prefix = f"{context.source.block_name(block)}."
        for corpus, weight in MIXED.weights:
            split = context.samples[corpus, 0].held_out if held_out else context.samples[corpus, 0].calibration
            mass = sum(part.mass for part in split.parts)
            for part in split.parts:
                tokens_SL = windows_by_key(context.cached.store, part.key)
                x, y = plain_inputs(dense, tokens_SL), plain_inputs(model, tokens_SL)
                for name in (name for name in x if name.startswith(prefix)):
                    outputs_TO = x[name] @ dense.get_parameter(f"{name}.weight").detach().mT
                    error_TO = outputs_TO - y[name] @ written[f"{name}.weight"].mT
                    both = sums.setdefault(name, [0.0, 0.0])
                    both[0] += weight * part.weight / mass * float(error_TO.square().sum())
                    both[1] += weight * part.weight / mass * float(outputs_TO.square().sum())
        model.load_state_dict({name: value for name, value in written.items() if name.startswith(prefix)}, strict=False)
    return {name: loss / energy for name, (loss, energy) in sums.items()}


def test_reported_losses_are_those_of_the_dense_models_outputs(
    tmp_path: Path, store: Store, source: ModelSource
) -> None:
    context = context_of(tmp_path / "run", store, source)
    solved(context, CORRECTED)
    rows = layer_rows(context, [CORRECTED])
    assert len(rows) == 2 * 7
    reported = {row.layer: row.relative_loss for row in rows}
    assert reported == pytest.approx(true_losses(context, CORRECTED, held_out=False), rel=ROUNDOFF_F32)
    reported = {row.layer: row.heldout_relative_loss for row in rows}
    assert reported == pytest.approx(true_losses(context, CORRECTED, held_out=True), rel=ROUNDOFF_F32)


def test_correcting_comes_closer_to_the_dense_outputs(tmp_path: Path, store: Store, source: ModelSource) -> None:
    """After the first block, which has no upstream error. With `propagation` 0 the recipe equals the plain one."""
    context = context_of(tmp_path / "run", store, source)
    none = recipe("none", ("qep", {"propagation": 0.0, "damping": 1.0}), GPTQ)
    full = recipe("full", ("qep", {"propagation": 1.0, "damping": 0.01}), GPTQ)
    for each in (PLAIN, none, full):
        solved(context, each)
    of = {each.name: contents(context.folder / "models" / each.name) for each in (PLAIN, none, full)}
    assert of["plain"] == of["none"] != of["full"]
    losses = {each.name: {r.layer: r.relative_loss for r in layer_rows(context, [each])} for each in (none, full)}
    for name, loss in losses["none"].items():
        if ".layers.0." in name:
            assert losses["full"][name] == pytest.approx(loss, rel=1e-3)
        else:
            assert losses["full"][name] < loss


# --- memory, disk and refusals ---------------------------------------------------------------------------------------


def test_memory_and_disk_of_pairs_are_counted(source: ModelSource, tmp_path: Path) -> None:
    shape = BlockShape("block", (("mlp.down_proj", 512), ("mlp.up_proj", 256)), 600_000, 1_200_000)
    matrix = (512**2 + 256**2) * 4
    both = EVERY | OF_TWO_STREAMS
    assert shape.summed_bytes(both) - shape.summed_bytes(EVERY) == 2 * matrix
    stored = moments_bytes([shape], 1, both) - moments_bytes([shape], 1, EVERY)
    assert stored == pytest.approx(3 * 0.42 * matrix, abs=4000)  # `cross` stores two triangles, `drift` one
    states = {"outside": 0, "hidden": 64, "tokens": 1000, "sets": 1, "itemsize": 4}
    more = reading_bytes([shape], statistics=both, **states) - reading_bytes([shape], statistics=EVERY, **states)
    assert more == 64 * 1000 * 4 + 2 * matrix
    one, two = (solving_bytes([shape] * 2, [CORRECTED], lanes=1, statistics=each) for each in (EVERY, both))
    assert two > one
    needed, windows_SL = 2 * 64 * 32 * source.config.hidden_size * 4, [windows(64, seed=0)]
    places = [
        spill_folder(source, windows_SL, dtype=torch.float32, device="cpu", free=needed, folder=tmp_path, streams=n)
        for n in (1, 2)
    ]
    assert places == [None, tmp_path]


def plan(**entry: Any) -> dict[str, Any]:
    entry = {"steps": [{"method": "qep"}, {"method": "gptq", "bits": 4, "group_size": 32}]} | entry
    return {"model": "m", "corpora": {"general": "g"}, "compress": [entry]}


@pytest.mark.parametrize("upstream", ["dense", ["sequential", "dense"], None])
def test_a_dense_upstream_is_refused(upstream: Any) -> None:
    said = {} if upstream is None else {"upstream": upstream}
    with pytest.raises(PlanError, match="a dense upstream has none") as caught:
        variants(parse_plan(plan(**said)))
    assert caught.value.where == "compress.0"
    assert "sequential" in str(caught.value.do)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([{"method": "qep"}], "before it is pruned or rounded"),
        ([{"method": "gptq", "bits": 4}, {"method": "qep"}], "before it is pruned or rounded"),
        ([{"method": "qep"}, {"method": "gptq", "bits": 4}, {"method": "bias"}], "mean is not collected"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(steps: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        variants(parse_plan(plan(steps=steps, upstream="sequential")))


def test_experts_are_refused_before_anything_is_read() -> None:
    [error] = unpaired([PLAIN, CORRECTED], ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"])
    assert "no pairs" in str(error)
    assert error.got == "corrected"
    assert not list(unpaired([PLAIN], ["model.layers.0.mlp.experts"]))
    assert not list(unpaired([CORRECTED], []))


# --- a whole run -----------------------------------------------------------------------------------------------------


def check(place: Place) -> dict[str, Any]:
    return json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)


def rows(record: Mapping[str, Any]) -> list[LayerRow]:
    return read_rows(Path(record["run_dir"]) / "layers.jsonl", LayerRow)


def test_a_run_corrects_and_says_what_its_losses_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    rounding = {"method": "gptq", "bits": 3, "group_size": 32}
    common = {"domain": "legal", "alpha": 0.5, "upstream": "sequential"}
    place.write_plan(compress=[{**rounding, **common}])
    before = check(place)
    place.write_plan(compress=[{**rounding, **common}, {"steps": [{"method": "qep"}, rounding], **common}])
    after = check(place)
    assert set(after["sums"]) == set(before["sums"]) | {"cross", "drift"}
    assert not after["problems"]
    for kind, which in (("memory", "reading_bytes"), ("memory", "solving_bytes"), ("disk", "store_bytes")):
        assert after[kind][which] > before[kind][which]
    first = place.run()
    names = {row.variant for row in rows(first)}
    corrected = next(name for name in names if name.startswith("qep-"))
    assert len(names) == 2
    assert any(corrected in note and "dense model's outputs" in note for note in first["notes"])
    assert all(row.relative_loss is not None and row.heldout_relative_loss is not None for row in rows(first))
    assert corrected in (place.run_dir / "report.html").read_text()
    again = place.run("--out", str(tmp_path / "again"))
    assert again["calibration_tokens_read"] == 0

    place.write_plan(compress=[{"steps": [{"method": "qep"}, rounding], "domain": "legal", "alpha": 0.5}])
    for command in (("plan", "check"), ("run",)):
        done = crosscal(*command, str(place.plan), "--home", str(place.home))
        assert done.code != 0
        assert "upstream: sequential" in done.err + done.out
        assert "Traceback" not in done.err
