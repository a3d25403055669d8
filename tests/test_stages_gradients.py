"""Gradients as a cached statistic: walked once, resumed, added, folded, stored bit for bit; memory, and a whole run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscal.calibration.sets import windows_by_key
from crosscal.errors import CorruptArtifact, NotFinite, StatisticsError
from crosscal.models import ModelSource
from crosscal.models.blocks import BlockCalls, find_blocks, further_outputs
from crosscal.models.calls import CarriedState
from crosscal.report.rows import LayerRow, read_rows
from crosscal.stages.folding import fold, sets_to_read, unread_tokens
from crosscal.stages.gradients import KIND, CachedGradients, Gradients
from crosscal.stages.preflight import ACTIVATIONS
from crosscal.statistics import VECTORS, Gradient, GradientSums
from crosscal.store import Store
from crosscal.store.gradients import read_gradients, write_gradients
from tests.helpers.growing_corpus import ALL, drawn, grow
from tests.helpers.tiny_gradients import known, walk
from tests.helpers.tiny_models import load_plain, save_model
from tests.helpers.tiny_place import Place, crosscal, make_place
from tests.helpers.tiny_run import keep_windows, windows
from tests.helpers.tiny_text import tiny_llama

pytestmark = pytest.mark.usefixtures("quick_disk")
SITES = 4  # per block


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    tiny_llama(folder := tmp_path_factory.mktemp("model"))
    return ModelSource.open(folder)


def every(cached: CachedGradients, source: ModelSource, key: str) -> dict[tuple[int, str], Tensor]:
    """Return (block, matrix) -> Σ g²."""
    return {
        (block, matrix): square_OI
        for block in range(source.blocks)
        for site in cached.sites(block) or ()
        for matrix, square_OI in cached.read(key, block, site).squares.items()
    }


def test_a_set_is_walked_once_and_an_interrupted_walk_goes_on(tmp_path: Path, source: ModelSource) -> None:
    whole, parts = (known(Store(tmp_path / name), source) for name in ("whole", "parts"))
    key, tokens = keep_windows(whole.store, windows(3, seed=1)), 3 * 32
    assert keep_windows(parts.store, windows(3, seed=1)) == key
    first = walk(whole, source, [key])
    assert (first.tokens_read, first.hits, first.misses) == (tokens, 0, SITES * source.blocks)
    again = walk(whole, source, [key])
    assert (again.tokens_read, again.hits, again.misses) == (0, SITES * source.blocks, 0)

    class Killed(Exception):
        pass

    def killed(what: str, done: int, total: int | None) -> None:
        if total is not None and done == total - 1:  # only the first block is left
            raise Killed

    with pytest.raises(Killed):
        walk(parts, source, [key], report=killed)
    there = [block for block in range(source.blocks) if parts.has(key, block)]
    assert there == list(range(1, source.blocks))
    resumed = walk(parts, source, [key])
    assert (resumed.hits, resumed.misses) == (SITES * len(there), SITES)
    expected = every(whole, source, key)
    found = every(parts, source, key)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], expected[place]) for place in expected)


def test_sums_over_disjoint_sets_add(store: Store, source: ModelSource) -> None:
    cached, tokens_SL = known(store, source, "float64"), windows(5, seed=2)
    keys = [keep_windows(store, each) for each in (tokens_SL, tokens_SL[:2], tokens_SL[2:])]
    walk(cached, source, keys)
    for block in range(source.blocks):
        for site in cached.sites(block) or ():
            whole, first, rest = (cached.read(key, block, site) for key in keys)
            total = first + rest
            assert total.windows == whole.windows == 5
            for matrix, square_OI in whole.squares.items():
                torch.testing.assert_close(total.squares[matrix], square_OI)
            half = first.weighted(0.5) + rest
            assert half.mass == 4.0
            for matrix, mean_OI in half.means().items():
                expected_OI = (0.5 * first.squares[matrix] + rest.squares[matrix]) / 4.0
                torch.testing.assert_close(mean_OI, expected_OI)


def test_sums_that_do_not_fit_are_refused() -> None:
    mine, other = (GradientSums({"q": torch.zeros(2, size)}, 1) for size in (3, 4))
    with pytest.raises(StatisticsError, match="different sites"):
        mine + other
    with pytest.raises(NotFinite, match=r"here: .*not finite"):
        GradientSums({"q": torch.full((2, 3), torch.nan)}, 1).means("here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [1.0, 0.375])
def test_what_is_stored_is_read_back_bit_for_bit(
    store: Store, dtype: torch.dtype, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosscal.store.gradients.BATCH_ENTRIES", 50)
    generator = torch.Generator().manual_seed(0)
    sizes = {"self_attn.q_proj": (9, 16), "experts.3.down_proj": (1, 3), "transposed": (5, 7)}
    squares = {name: torch.randn(shape, generator=generator, dtype=dtype) ** 2 for name, shape in sizes.items()}
    squares["transposed"] = squares["transposed"].mT
    sums = GradientSums(squares, 7).weighted(weight)
    with store.publish(KIND, "0" * 64, {}) as folder:
        write_gradients(folder, sums)
    found = read_gradients(store, store.get(KIND, "0" * 64))
    assert (found.windows, found.mass) == (sums.windows, sums.mass)
    assert found.squares.keys() == squares.keys()
    for name, square_OI in sums.squares.items():
        assert found.squares[name].dtype == dtype
        assert torch.equal(found.squares[name], square_OI)


def test_files_that_are_no_gradients_name_the_artifact(store: Store) -> None:
    with store.publish(KIND, "1" * 64, {}) as folder:
        (folder / "gradients.arrow").write_bytes(b"nothing of the kind")
    with pytest.raises(CorruptArtifact, match="gradients/1111"):
        read_gradients(store, store.get(KIND, "1" * 64))


@pytest.mark.parametrize("windows", [10_000, 12])
def test_gradients_of_a_corpus_that_grows_are_folded(tmp_path: Path, source: ModelSource, windows: int) -> None:
    draw = dataclasses.replace(ALL, windows=windows, held_out_windows=windows)
    store, landed, _ = grow(tmp_path, source, draw, 7, wanted=frozenset(VECTORS))
    cached, read = known(store, source), []
    for each in landed:
        before = unread_tokens(cached, source.blocks, each.calibration)
        done = walk(cached, source, sets_to_read(cached, source.blocks, each, held_out=False))
        fold(cached, source.blocks, each, held_out=False)
        read.append(done.tokens_read)
        assert read[-1] == before
    newest = landed[-1]
    assert sum(read) == newest.calibration.tokens, "nothing is walked twice"
    assert len(list(store.keys(KIND))) <= SITES * source.blocks * (draw.parts_kept_apart + 3)
    means = Gradients(cached, {("legal", 0): newest})
    alone = known(Store(tmp_path / "anew"), source)
    weights = {part.key: part.weight for part in drawn(store, newest.calibration)}
    keys = {key: keep_windows(alone.store, windows_by_key(store, key)) for key in weights}
    walk(alone, source, list(keys.values()))
    for site in cached.sites(1) or ():
        total = [alone.read(keys[key], 1, site).weighted(weight) for key, weight in weights.items()]
        found = means.means("legal", 0, 1, site, "here")
        for matrix, mean_OI in found.items():
            wanted_OI = sum(each.squares[matrix].double() for each in total) / sum(each.mass for each in total)
            torch.testing.assert_close(mean_OI.double(), wanted_OI, rtol=0, atol=1e-5 * float(wanted_OI.max()))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt-neox", "phi"])
def test_activations_are_reckoned_as_autograd_keeps_them(family: str, tmp_path: Path) -> None:
    """The estimate is 1 to 2.5 times what autograd keeps."""
    model = load_plain(save_model(family, tmp_path / "model"), torch.float32).requires_grad_(False)
    block, tokens_1L = find_blocks(model)[1][0], windows(1, seed=0, high=90)
    calls = BlockCalls(model, further_outputs(model, block, tokens_1L))
    hidden_1LD = calls.enter(tokens_1L).detach().requires_grad_()
    weights = {p.requires_grad_(p.ndim > 1).untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        calls.of(None, 0).run(block, hidden_1LD.clone(), CarriedState())
    numbers = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights) / 4
    reckoned = tokens_1L.shape[1] * (ACTIVATIONS[0] * 32 + ACTIVATIONS[1] * 48)
    assert numbers <= reckoned <= 2.5 * numbers


def check(place: Place) -> dict[str, Any]:
    return json.loads(crosscal("plan", "check", str(place.plan), "--home", str(place.home), "--json").out)


def test_run_computes_gradients_once_and_only_if_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_place(tmp_path)
    wanda = {"method": "wanda", "sparsity": 0.5, "domain": "legal", "alpha": 0.5}
    gblm = {**wanda, "method": "gblm", "gradient_weight": [0, 25], "upstream": ["dense", "sequential"]}
    place.write_plan(compress=[wanda])
    small = check(place)
    assert Gradient.SQUARE not in small["sums"]
    assert small["memory"]["gradients_bytes"] == 0
    first = place.run()
    assert not list(Store(place.home).keys(KIND)), "no step needed any"

    place.write_plan(compress=[wanda, gblm])
    before = check(place)
    assert Gradient.SQUARE in before["sums"]
    mine = [each for each in before["reading"] if each.get("of") == Gradient.SQUARE]
    assert {each["corpus"] for each in mine} == {"general", "legal"}
    assert sum(each["tokens_to_read"] for each in mine) == 2 * 8 * 32, "calibration windows, not held-out ones"
    assert before["memory"]["gradients_bytes"] > 0
    second = place.run("--out", str(tmp_path / "more"))
    again = sum(each["tokens_to_read"] for each in before["reading"] if each["state"] == "at most")
    assert second["calibration_tokens_read"] == 2 * 8 * 32 + again
    assert first["calibration_tokens_read"] > 0
    taken = sum(artifact.bytes for artifact in Store(place.home).list(KIND))
    reckoned = before["disk"]["store_bytes"] - check(place)["disk"]["store_bytes"]
    assert taken == pytest.approx(reckoned, rel=0.35)

    rows = read_rows(Path(second["run_dir"]) / "layers.jsonl", LayerRow)
    assert all(row.sparsity == 0.5 for row in rows)
    models = tmp_path / "more" / "models"
    zero, plain = models / "gblm-50-gradientweight0-legal-a0.5", models / "wanda-50-legal-a0.5"
    shards = sorted(file.name for file in plain.glob("*.safetensors"))
    assert shards
    assert all((zero / name).read_bytes() == (plain / name).read_bytes() for name in shards), "a = 0 is Wanda"

    third = place.run("--out", str(tmp_path / "again"))
    assert third["calibration_tokens_read"] == 0
    assert check(place)["memory"]["gradients_bytes"] == 0
