"""The forward and backward walk against plain autograd through the whole model, window by window."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crosscal.errors import ModelError
from crosscal.models import ModelSource
from crosscal.models.gradients import BlockGradients, walk_back
from crosscal.models.walk import survey
from tests.helpers.tiny_models import FAMILIES, load_plain, save_model, windows

ROUNDOFF_F64 = 1e-6  # routers of some families compute in float32, whatever the model does
ROUNDOFF_F32 = 1e-4
SLICES = {"long": windows(3), "short": windows(2, seed=5, length=10)}
Squares = dict[str, dict[str, Tensor]]


def collect(source: ModelSource, slices: Mapping[str, Tensor], **settings) -> Squares:
    """Slice -> full name of a matrix -> Σ g² [O, I]."""
    found = survey(source)
    matrices = {block: [m for site in each.sites for m in site.matrices] for block, each in enumerate(found)}
    seen: Squares = {name: {} for name in slices}

    def on_block(gradients: BlockGradients) -> None:
        name = source.block_name(gradients.block)
        for each, squares in gradients.squares.items():
            seen[each] |= {f"{name}.{m.name}": m.weight_OI(squares) for m in matrices[gradients.block]}

    settings.setdefault("wanted", lambda block: list(slices))
    parameters = {block: {m.parameter: None for m in each} for block, each in matrices.items()}
    walk_back(source, slices, on_block=on_block, parameters=lambda block: list(parameters[block]), **settings)
    return seen


def plain(source: ModelSource, slices: Mapping[str, Tensor]) -> Squares:
    """Return the same by one backward pass of the whole model for each window, in float64."""
    model = load_plain(source.path)
    found: Squares = {name: {} for name in slices}
    for name, tokens_SL in slices.items():
        total: dict[str, Tensor] = {}
        for window_L in tokens_SL:
            model.zero_grad()
            logits_RV = model(input_ids=window_L[None], use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits_RV, window_L[1:]).backward()
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[key] = total.get(key, 0) + parameter.grad**2
        for block, each in enumerate(survey(source)):
            prefix = source.block_name(block)
            of_block = {key.removeprefix(f"{prefix}."): value for key, value in total.items() if f"{prefix}." in key}
            for matrix in (m for site in each.sites for m in site.matrices):
                found[name][f"{prefix}.{matrix.name}"] = matrix.weight_OI(of_block)
    return found


def assert_same(seen: Squares, expected: Squares, rtol: float) -> None:
    assert seen.keys() == expected.keys()
    for name, squares in expected.items():
        assert seen[name].keys() == squares.keys()
        for matrix, square_OI in squares.items():
            bound = rtol * float(square_OI.abs().max())
            torch.testing.assert_close(seen[name][matrix].double(), square_OI.double(), rtol=0, atol=bound, msg=matrix)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_autograd(family: str, tmp_path: Path) -> None:
    """For every matrix of every family, including stacked experts and tied embeddings."""
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    expected = plain(source, SLICES)
    assert any(square_OI.any() for square_OI in expected["long"].values())
    assert_same(collect(source, SLICES, dtype=torch.float64), expected, ROUNDOFF_F64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource.open(save_model("llama", tmp_path_factory.mktemp("gradients") / "model"))


def test_float32_is_close_to_plain_autograd_in_float64(llama: ModelSource) -> None:
    found = collect(llama, SLICES)
    assert next(iter(found["long"].values())).dtype == torch.float32
    assert_same(found, plain(llama, SLICES), ROUNDOFF_F32)


def test_the_sums_have_the_same_bits_however_they_are_computed(llama: ModelSource, tmp_path: Path) -> None:
    """On one thread or more, with inputs on disk, and with the first blocks left out."""
    expected = collect(llama, SLICES)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if usual != 3 else 2)
        assert_same(collect(llama, SLICES), expected, 0)
    finally:
        torch.set_num_threads(usual)
    assert_same(collect(llama, SLICES, spill_to=tmp_path / "spilled"), expected, 0)
    assert not list((tmp_path / "spilled").iterdir())

    def wanted(block: int) -> Collection[str]:
        return {1: ["short"], 2: ["long", "short"]}.get(block, [])

    part = collect(llama, SLICES, wanted=wanted)
    blocks = {name: {matrix.split(".")[2] for matrix in squares} for name, squares in part.items()}
    assert blocks == {"long": {"2"}, "short": {"1", "2"}}
    for name, squares in part.items():
        assert all(torch.equal(square_OI, expected[name][matrix]) for matrix, square_OI in squares.items())


def test_windows_add(llama: ModelSource) -> None:
    whole, first, rest = (collect(llama, {"all": each}, dtype=torch.float64)["all"] for each in cut(SLICES["long"]))
    for matrix, square_OI in whole.items():
        torch.testing.assert_close(first[matrix] + rest[matrix], square_OI)


def cut(tokens_SL: Tensor) -> list[Tensor]:
    return [tokens_SL, tokens_SL[:1], tokens_SL[1:]]


def test_nothing_wanted_reads_nothing(llama: ModelSource) -> None:
    assert collect(llama, SLICES, wanted=lambda block: []) == {"long": {}, "short": {}}


def test_progress_ends_where_it_says(llama: ModelSource) -> None:
    told: list[tuple[int, int | None]] = []
    collect(llama, SLICES, progress=lambda _, done, total: told.append((done, total)))
    assert told == [(number, 7) for number in range(1, 8)], "three blocks there, the loss, three blocks back"


def test_what_has_no_gradient_is_refused(llama: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="next one"):
        collect(llama, {"all": windows(2, length=1)})
    broken = ModelSource.open(save_model("llama", tmp_path / "model", scale=1e12))
    with pytest.raises(ModelError, match="not finite"):
        collect(broken, SLICES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_gpu_gives_the_same(family: str, tmp_path: Path) -> None:
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    there, here = (collect(source, SLICES, dtype=torch.float64, device=device) for device in ("cuda", "cpu"))
    assert_same(there, here, ROUNDOFF_F64)
