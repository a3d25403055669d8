"""Building models changes nothing that other threads of the process could see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from crosscal.models import ModelSource, load_variant
from tests.helpers.tiny_models import FAMILIES, load_plain, save_model

ROUNDS = 15
PATCHED = (
    (nn.Module, "register_parameter"),
    (nn.Module, "register_buffer"),
    (nn.init, "kaiming_uniform_"),
    (torch, "linspace"),
    (PreTrainedModel, "tie_weights"),
    (PreTrainedModel, "init_weights"),
)


def run_all(jobs: list[Callable[[], object]]) -> None:
    errors: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    """(device, dtype) of the linears that another thread builds meanwhile."""
    seen: set[tuple[str, str]] = set()
    over = threading.Event()

    def build() -> None:
        while not over.is_set():
            weight = nn.Linear(2, 2).weight
            seen.add((weight.device.type, str(weight.dtype)))

    thread = threading.Thread(target=build)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_other_threads_see_nothing_of_skeletons(tmp_path: Path) -> None:
    source = ModelSource.open(save_model("llama-tied", tmp_path / "model", dtype=torch.bfloat16))
    before = [getattr(owner, name) for owner, name in PATCHED]

    def build(dtype: torch.dtype) -> None:
        for _ in range(ROUNDS):
            model = source.skeleton(dtype)
            assert {(parameter.is_meta, parameter.dtype) for parameter in model.parameters()} == {(True, dtype)}

    with watched() as seen:
        run_all([lambda dtype=dtype: build(dtype) for dtype in (torch.float32, torch.bfloat16) for _ in range(3)])
    assert seen == {("cpu", "torch.float32")}
    assert [getattr(owner, name) for owner, name in PATCHED] == before


def test_loading_and_building_at_once_do_not_mix(tmp_path: Path) -> None:
    """Loading disables weight tying for every class; models built meanwhile must not be affected."""
    folder = save_model("llama-tied", tmp_path / "model")
    source, before = ModelSource.open(folder), [getattr(owner, name) for owner, name in PATCHED]

    def is_tied(model: PreTrainedModel) -> bool:
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def load() -> None:
        for _ in range(ROUNDS):
            model = load_variant(folder, dtype=torch.float32)
            assert is_tied(model)
            assert not any(parameter.is_meta for parameter in model.parameters())

    def build() -> None:
        for _ in range(ROUNDS):
            assert is_tied(source.skeleton())

    with watched() as seen:
        run_all([load, build] * 3)
    assert seen == {("cpu", "torch.float32")}
    assert [getattr(owner, name) for owner, name in PATCHED] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_computed_buffers_are_those_of_the_loaded_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "model")
    plain, built = load_plain(folder, dtype), ModelSource.open(folder).skeleton(dtype)
    stored, expected, got = plain.state_dict().keys(), dict(plain.named_buffers()), dict(built.named_buffers())
    assert built.state_dict().keys() == stored
    assert got.keys() == expected.keys()
    for name in expected.keys() - stored:
        assert got[name].dtype == expected[name].dtype, name
        assert torch.equal(got[name], expected[name]), name


def test_threads_share_one_source(tmp_path: Path) -> None:
    source, found = ModelSource.open(save_model("llama", tmp_path / "model")), list[object]()
    start = threading.Barrier(6)

    def ask() -> None:
        start.wait()
        found.append(source.weights)
        assert source.load_block(1)["self_attn.q_proj.weight"].shape == (32, 32)

    run_all([ask] * 6)
    assert len({id(weights) for weights in found}) == 1
