"""Stages of a run on a simulated GPU: from the calibration pass to the evaluation.

See `tests/helpers/pretend_device.py` for what it detects and what needs a real GPU.
"""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscal.corpora.corpus import load_corpus
from crosscal.errors import UsageError
from crosscal.evaluation import logits, perplexity, window_nll
from crosscal.models import ModelSource
from crosscal.models.loading import load_variant
from crosscal.plan import load_plan
from crosscal.progress import silent
from crosscal.report.rows import ResultRow, read_rows
from crosscal.stages.compress import RunContext, compress_sequential
from crosscal.stages.gradients import CachedGradients, Gradients, collect_gradients
from crosscal.stages.heldout_text import WindowCutting, windows_for
from crosscal.stages.memory import free_bytes, usable_bytes
from crosscal.stages.solve import solve_block
from crosscal.statistics import Mixture
from crosscal.store import Store
from crosscal.tasks.corpora import stored_name
from crosscal.tasks.run_spec import resolve_device
from crosscal.variants import RecipeStep, Variant
from tests.helpers.pretend_device import MEMORY_BYTES, assert_same, devices_of, pretended_cuda
from tests.helpers.pretended_tensor import PACKAGE, Seen
from tests.helpers.tiny_models import save_model, windows
from tests.helpers.tiny_place import make_place
from tests.helpers.tiny_run import collect, dense_cache, run_context, tiny_source, variant
from tests.helpers.tiny_text import tiny_llama
from tests.helpers.tiny_variants import MIXED, samples
from tests.test_calibration_generation import writer
from tests.test_device_laws import FIRST, ROUNDOFF_F32
from tests.test_models_walk import collect as seen_by_walk

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device: see the tests marked `gpu`")


@pytest.fixture(scope="module", autouse=True)
def seen() -> Iterator[Seen]:
    with pretended_cuda() as device:
        yield device


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """Context with float64 moments and gradients, computed on a CPU."""
    folder = tmp_path_factory.mktemp("device")
    source, store = tiny_source(folder / "model"), Store(folder / "home")
    made = in_float64(run_context(folder / "run", store, source, *samples(store)))
    for each in made.samples.values():
        collect(made.cached, source, each.sets)
    gradients = Gradients(CachedGradients(made.cached), made.samples)
    sets = [part.key for each in made.samples.values() for part in each.calibration.parts]
    collect_gradients(gradients.cached, source, sets, device="cpu", batch_tokens=64, report=silent)
    return dataclasses.replace(made, gradients=gradients)


def in_float64(context: RunContext) -> RunContext:
    """In float64 a CPU runs the same code as a GPU: its own kernels are for float32 only."""
    return dataclasses.replace(context, cached=dense_cache(context.cached.store, context.source, "float64"))


def every_method() -> list[Variant]:
    """Each pruner and rounder alone; all refinements and repairs after both, the last on a mixture of its own."""
    alone = [name for name, case in FIRST.items() if case.kind in ("prune", "quantize")]
    refining = [name for name, case in FIRST.items() if case.kind in ("refine", "repair")]
    others = [step_of(name) for name in refining if name != "bias"]  # the linears of this family have no bias
    others.append(dataclasses.replace(others[-1], mixture=Mixture.of({"general": 1.0})))
    long = (step_of("magnitude"), *others, step_of("rtn"), *others)
    recipe = dataclasses.replace(variant("recipe", "magnitude", MIXED), recipe=long)
    return [
        *(dataclasses.replace(recipe, name=name, recipe=(step_of(name),)) for name in alone),
        dataclasses.replace(recipe, name="trace", recipe=(step_of("rtn"),), trace_normalised=True),
        recipe,
    ]


def step_of(name: str) -> RecipeStep:
    case = FIRST[name]
    return RecipeStep(name, tuple((each.name, getattr(case, each.name)) for each in dataclasses.fields(case)))


def test_a_block_is_solved_on_the_device_and_handed_out_on_the_cpu(context: RunContext) -> None:
    variants = every_method()
    here, there = (
        solve_block(dataclasses.replace(context.problem(1, context.cached), device=device), variants)
        for device in ("cpu", "cuda")
    )
    for name, expected in here.items():
        found = there[name]
        assert_same([found.changed, found.dense], [expected.changed, expected.dense], "cpu")
        pairs = zip(found.rows, expected.rows, strict=True)
        assert all(dataclasses.replace(mine, seconds=0) == dataclasses.replace(own, seconds=0) for mine, own in pairs)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_sequential_model_is_made_through_the_device(context: RunContext, tmp_path: Path, corrected: bool) -> None:
    one = variant("sequential", "sparsegpt", MIXED, sparsity=0.5, damping=0.01, upstream="sequential")
    if corrected:
        one = dataclasses.replace(one, recipe=(RecipeStep("qep", ()), *one.recipe))
    made = {}
    for device in ("cpu", "cuda"):
        store = Store(tmp_path / device / "home")
        own = in_float64(run_context(tmp_path / device / "run", store, context.source, *samples(store)))
        own = dataclasses.replace(own, device=device)
        compress_sequential(own, one, batch_tokens=64, report=silent)
        made[device] = [own.writer(one).read_block(block, bits=None) for block in range(own.source.blocks)]
    assert_same(made["cuda"], made["cpu"], "cpu", ROUNDOFF_F32)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon-alibi", "mixtral", "gpt-oss"])
def test_a_walk_on_the_device(family: str, tmp_path: Path) -> None:
    source, slices = ModelSource.open(save_model(family, tmp_path / "model")), {"all": windows(3)}
    settings: dict[str, Any] = {"dtype": torch.float64, "batch_tokens": 48}
    there, here = (seen_by_walk(source, slices, device=device, **settings)["all"] for device in ("cuda", "cpu"))
    for name, expected in here.items():
        scale = float(expected.gram_II.abs().max()) or 1.0
        assert there[name].tokens == expected.tokens
        assert_same(there[name].gram_II / scale, expected.gram_II / scale, "cpu", 1e-11)


def test_a_walk_in_half_precision_with_hidden_states_on_the_disk(tmp_path: Path) -> None:
    """The default dtype on a GPU is the checkpoint's; spilled hidden states are moved to the device batch by batch."""
    source = ModelSource.open(save_model("llama", tmp_path / "model", dtype=torch.bfloat16))
    slices = {"one": windows(3), "two": windows(2, seed=1)}
    kept = seen_by_walk(source, slices, device="cuda")
    spilled = seen_by_walk(source, slices, device="cuda", spill_to=tmp_path / "spilled")
    here = seen_by_walk(source, slices, dtype=torch.bfloat16)
    for name, of_slice in here.items():
        for matrix, expected in of_slice.items():
            found, scale = kept[name][matrix], float(expected.gram_II.abs().max())
            assert found.gram_II.dtype == torch.float32
            assert_same(found, spilled[name][matrix], "cpu")
            assert_same(found.gram_II / scale, expected.gram_II / scale, "cpu", 2e-2)


@pytest.mark.parametrize("in_pieces", [True, False])
def test_likelihoods_on_the_device(in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_SL = torch.randint(3, 400, (5, 32), generator=torch.Generator().manual_seed(0))
    expected_S = window_nll(tiny_llama(), tokens_SL, device="cpu", batch_tokens=64)
    if not in_pieces:
        monkeypatch.setattr(logits, "are_in_pieces", lambda *_: False)
    model = tiny_llama().to("cuda")
    assert devices_of(list(model.parameters())) == {"cuda:0"}
    found_S = window_nll(model, tokens_SL, device="cuda", batch_tokens=64)
    assert_same(found_S, expected_S, "cpu", ROUNDOFF_F32)


@pytest.mark.parametrize("settings", [{}, {"first_ids": (70, 71, 300), "end": 71}], ids=str)
def test_texts_are_written_on_the_device(settings: dict[str, Any], seen: Seen) -> None:
    seen.clear()
    there = writer(tiny_llama().to("cuda"), device="cuda", length=12, **settings).write(range(4), seed=7)
    assert sum(seen.waits.values()) <= 11, "the CPU waits once a token"
    assert there == writer(tiny_llama(), length=12, **settings).write(range(4), seed=7)


def test_a_whole_run_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """The reported perplexities equal those that a CPU measures."""
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    steps = [{"method": "wanda", "sparsity": 0.5}, {"method": "gptq", "bits": 4, "group_size": None}]
    place.write_plan(
        corpora={"general": "general", "own": "self"},
        calibration={"windows": 4, "length": 32, "held_out_windows": 2},
        compress=[{"domain": "own", "alpha": 0.5, "steps": steps}],
        execution={"device": "auto"},
    )
    seen.clear()
    place.run()
    waited = {where.partition(":")[0] for where in seen.waits}
    assert waited >= {"calibration/sampling.py", "statistics/moments.py", "compressors/problem.py"}
    assert "evaluation/likelihood.py" in waited
    store, source = Store(place.home), ModelSource.open(tmp_path / "model")
    plan, rows = load_plan(place.plan), read_rows(place.run_dir / "results.jsonl", ResultRow)
    assert {row.variant == "dense" for row in rows} == {True, False}
    for row in rows:
        model = load_variant(source.path if row.variant == "dense" else place.run_dir / "models" / row.variant)
        corpus = load_corpus(store, stored_name("general", plan.corpora["general"]))
        tokens_SL = windows_for(store, corpus, row.split, source, WindowCutting(32, {"test": 4, "validation": 32}))
        found = perplexity(model, tokens_SL, name=corpus.name, split=row.split, device="cpu")
        assert row.value == pytest.approx(found.value, rel=ROUNDOFF_F32)


def test_all_uses_of_torch_cuda_are_known() -> None:
    """All uses of `torch.cuda`: review and simulate any new one. There are no explicit synchronisations."""
    files = [file for folder in ("crosscal", "tasks", "flows") for file in (PACKAGE.parent / folder).rglob("*.py")]
    asked = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                asked.add((node.attr, file.name))
    of_memory = {(name, "memory.py") for name in ("mem_get_info", "memory_reserved", "memory_allocated")}
    assert asked == {("is_available", "run_spec.py"), ("device_count", "run_spec.py"), *of_memory}


def test_the_free_memory_is_the_devices() -> None:
    assert free_bytes("cuda") == free_bytes(torch.device("cuda", 0)) == MEMORY_BYTES[0]
    assert free_bytes("cpu") != MEMORY_BYTES[0]


def test_what_torch_holds_unused_of_a_device_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the memory that a first model has freed; without counting it, a second model would not fit."""
    assert usable_bytes("cuda") == free_bytes("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    assert usable_bytes("cuda:0") == free_bytes("cuda") + 4 * 2**20


def test_a_device_that_is_not_there_is_refused() -> None:
    assert [resolve_device(wanted) for wanted in ("auto", "cpu", "cuda", "cuda:0")] == ["cuda", "cpu", "cuda", "cuda:0"]
    for wanted in ("cuda:1", "cuda:", "gpu", "mps", "cuda:-1", "meta"):
        with pytest.raises(UsageError, match=r"device|GPU"):
            resolve_device(wanted)
