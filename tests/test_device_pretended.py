"""The simulated device raises the errors of a GPU, and records what the device tests rely on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crosscal.compressors import Magnitude, run
from crosscal.compressors.recipe import site_of
from crosscal.models.loading import load_variant
from crosscal.statistics.numba_sums import add_sums
from tests.helpers.pretend_device import devices_of, on_device, pretended_cuda
from tests.helpers.pretended_tensor import CUDA, DeviceMix, Seen, aten
from tests.helpers.problems import layer
from tests.helpers.tiny_text import tiny_llama

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")


@pytest.fixture(autouse=True)
def seen() -> Iterator[Seen]:
    with pretended_cuda() as device:
        yield device


def here() -> Tensor:
    return torch.arange(12.0).view(3, 4)


def there() -> Tensor:
    return here().to("cuda")


def cpu_numbers(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


MIXES: dict[str, Callable[[], Any]] = {
    "product": lambda: there() @ here().mT,
    "sum": lambda: there() + here(),
    "sum in place": lambda: there().add_(here()),
    "sum into a CPU tensor": lambda: here().add_(there()),
    "a single number on the CPU in a product": lambda: torch.dot(there()[0], torch.ones(4)),
    "a single number on the CPU that would be changed": lambda: torch.tensor(1.0).add_(there().sum()),
    "an `out` on the CPU": lambda: torch.sub(there(), there(), out=here()),
    "mask": lambda: torch.where(here() > 1, there(), 0.0),
    "concatenation": lambda: torch.cat([there(), here()]),
    "comparison": lambda: torch.equal(there(), here()),
    "index on the CPU": lambda: there()[torch.tensor([0])],
    "CPU tensor by an index on the device": lambda: here()[torch.tensor([0], device="cuda:0")],
    "values put at indices": lambda: there().__setitem__([0, 1], here()[:2]),
    "linear layer": lambda: nn.Linear(4, 2)(there()),
    "linear layer that moved": lambda: nn.Linear(4, 2).to("cuda")(here()),
    "random numbers of a CPU's generator": lambda: torch.rand(3, device="cuda", generator=cpu_numbers()),
    "draws of a CPU's generator": lambda: torch.multinomial(there() + 1, 1, generator=cpu_numbers()),
    "inference": lambda: torch.inference_mode()(lambda: there().float() @ here().mT)(),
    "another thread": lambda: ThreadPoolExecutor(1).submit(lambda: there() * here()).result(),
}


@pytest.mark.parametrize("case", MIXES)
def test_a_mix_of_devices_raises(case: str) -> None:
    with pytest.raises(DeviceMix, match="cuda"):
        MIXES[case]()


def test_what_a_gpu_allows_is_allowed() -> None:
    x = there()
    single = torch.tensor(2.0)
    x += single
    x[0] = torch.zeros(4)  # a copy between devices
    x[[1]] = single
    x[x > 5] = single
    here().copy_(x)
    assert torch.equal(x.masked_fill(x == 0, single).cpu(), torch.full((3, 4), 2.0))
    rolled = torch.rand(3, device="cuda", generator=cpu_numbers("cuda"))
    assert torch.equal(rolled.cpu(), torch.rand(3, generator=cpu_numbers()))


CPU_ONLY: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "numpy": (TypeError, lambda: there().numpy()),
    "asarray": (TypeError, lambda: np.asarray(there())),
    "address": (RuntimeError, lambda: there().data_ptr()),
    "compiled sums": (TypeError, lambda: add_sums(there().numpy(), np.zeros(4), np.zeros(4))),
    "no CUDA kernel": (NotImplementedError, lambda: torch.histogram(there(), 3)),
}


@pytest.mark.parametrize("case", CPU_ONLY)
def test_what_a_cpu_alone_can_do_raises(case: str) -> None:
    error, action = CPU_ONLY[case]
    with pytest.raises(error, match=r"numpy|cuda|CUDA"):
        action()


def test_tensors_claim_the_device_whatever_made_them() -> None:
    x = there()
    made = [x, x[1:], x.mT, x.to(torch.float16), torch.empty_like(x), x.new_ones(2), torch.tensor(1.0, device="cuda:0")]
    made += [torch.arange(3, device="cuda"), torch.eye(2, device="cuda"), torch.zeros(2, device="cuda:0")]
    made += [*torch.linalg.eigh(x.mT @ x), nn.Linear(4, 2).to("cuda").weight, x.sum(), ~(x > 1)]
    assert all(tensor.is_cuda and not tensor.is_cpu and tensor.device == CUDA for tensor in made)
    back = [x.cpu(), x.to("cpu"), torch.empty(3, 4).copy_(x), x.to("cpu", torch.float64)]
    assert all(type(tensor) is Tensor and tensor.is_cpu for tensor in back)


def test_a_transfer_is_a_copy_and_a_view_is_not() -> None:
    origin = here()
    x = origin.to("cuda")
    assert x.to("cuda") is x
    y = x.cpu()
    x[1:].mul_(10)
    x.mT[0] = -1.0
    assert torch.equal(origin, here())
    assert torch.equal(y, here())
    assert x.tolist() == [[-1.0, 1.0, 2.0, 3.0], [-1.0, 50.0, 60.0, 70.0], [-1.0, 90.0, 100.0, 110.0]]


def test_a_result_left_on_the_wrong_device_is_seen() -> None:
    site = run(site_of([on_device(layer(4, 8))]), [Magnitude(0.5)])
    assert devices_of(site) == {"cuda:0"}
    [first] = site.layers
    left = dataclasses.replace(site, layers=(dataclasses.replace(first, keep_OI=first.keep_OI.cpu()),))
    assert devices_of(left) == {"cpu", "cuda:0"}
    assert devices_of([{"a": here()}, 3, "b"]) == {"cpu"}


def test_waiting_for_the_device_is_counted(seen: Seen) -> None:
    x = there()
    for wait in (lambda: float(x.sum()), lambda: bool(x.any()), x.cpu, x.tolist, x.nonzero, lambda: x[x > 1]):
        before = sum(seen.waits.values())
        wait()
        assert sum(seen.waits.values()) == before + 1
    seen.clear()
    x.mul_(2).masked_fill_(x > 3, 0.0)
    x[x > 1] = 0.0
    assert not seen.waits
    assert aten.mul_.Tensor in seen.operations


def test_models_of_transformers_are_loaded_inside_as_outside(tmp_path: Path) -> None:
    """transformers computes the models' buffers, in uninitialised memory."""
    written = tiny_llama(tmp_path)
    filled = [torch.full((4,), 7e7) for _ in range(10_000)]
    del filled
    for device in ("cpu", "cuda"):
        loaded = load_variant(tmp_path, device=device)
        for (name, found), expected in zip(loaded.named_buffers(), written.buffers(), strict=True):
            assert torch.equal(found.cpu(), expected), name


def test_nothing_is_left_behind() -> None:
    before = torch.Generator, torch.cuda.mem_get_info, Tensor.to
    with pretended_cuda():
        assert (torch.Generator, torch.cuda.mem_get_info, Tensor.to) != before
    assert (torch.Generator, torch.cuda.mem_get_info, Tensor.to) == before
