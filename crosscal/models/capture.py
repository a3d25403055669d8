"""Capture the inputs of a block's sites during a forward pass and pass them to a callback.

Shapes: T tokens, H hidden size, F inner size of an expert.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from crosscal.models import experts
from crosscal.models.blocks import StopForward
from crosscal.models.products import Product, Products
from crosscal.models.sites import Site, input_of, pre_hooks

Take = Callable[[str, Tensor], None]
"""Called with a site's name and its input."""


class InputConsumer(Protocol):
    def __call__(self, take: Take, *, stop_after_last: bool = False) -> AbstractContextManager[None]: ...


class _Pass(threading.local):
    """State of the current thread's forward pass: the callback, and the sites reached so far."""

    take: Take
    stops: bool
    reached: set[str]


@contextmanager
def capture(block: nn.Module, sites: Sequence[Site]) -> Iterator[InputConsumer]:
    """Context: a forward pass of the block within `with taking(take)` calls `take` with the input of each site.

    The inputs of a stacked expert are the rows of the tokens routed to it; its inner activations are recomputed for
    this. `stop_after_last`: the pass ends with `StopForward` once every linear and stack was called, before the last of
    them computes. It runs to its end if one is not called (a starved expert), or if the block has matrices that are
    multiplied by directly. `find_matrices` ensures that no site is reached twice.
    """
    called = [site for site in sites if site.matrices[0].is_called]
    linear_sites = {site.name: site for site in called if site.matrices[0].expert is None}
    stacks = {site.matrices[0].parameter.rpartition(".")[0] for site in called if site.matrices[0].expert is not None}
    raw = {
        (site.matrices[0].parameter, site.matrices[0].expert or 0): site.name for site in sites if site not in called
    }
    raw_parameters = {parameter: block.get_parameter(parameter) for parameter, _ in raw}
    watched = {*linear_sites, *stacks}
    present = _Pass()

    @contextmanager
    def taking(take: Take, *, stop_after_last: bool = False) -> Iterator[None]:
        present.take, present.stops, present.reached = take, stop_after_last, set()
        with Products(raw_parameters, note_product) if raw else nullcontext():
            yield

    def note_reached(name: str) -> None:
        present.reached.add(name)
        if present.stops and present.reached == watched and not raw:
            raise StopForward

    def note_product(product: Product) -> None:
        present.take(raw[product.parameter, product.place], product.input_TI)

    def note_linear(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        present.take(name, input_of(args, kwargs))
        note_reached(name)

    def note_experts(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for expert, input_TH, input_TF in experts.routed_inputs(module, args, kwargs):
            present.take(f"{name}.{expert}.{experts.up_name(module)}", input_TH)
            present.take(f"{name}.{expert}.down_proj", input_TF)
        note_reached(name)

    with (
        pre_hooks({name: block.get_submodule(name) for name in linear_sites}, note_linear),
        pre_hooks({name: block.get_submodule(name) for name in stacks}, note_experts),
    ):
        yield taking
