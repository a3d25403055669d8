"""Feeds the inputs of a block's sites to moment accumulators while the block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from crosscal.models import experts
from crosscal.models.blocks import StopForward
from crosscal.models.sites import Site, input_of, pre_hooks
from crosscal.statistics.moments import MomentsAccumulator


@contextmanager
def capture(
    block: nn.Module,
    sites: Sequence[Site],
    accumulators: Mapping[str, MomentsAccumulator],
    *,
    stop_after_last: bool = False,
) -> Iterator[None]:
    """Inside, every forward pass of the block adds the inputs of each site to `accumulators[site.name]`.

    A stacked expert gets the rows of the tokens routed to it; its inner activations are computed once more for that.
    `stop_after_last`: the pass ends with `StopForward` once every site has had its input, before the last of them
    computes anything. A pass in which one has none (a starved expert) runs to its end. `find_sites` has seen that no
    site is reached twice.
    """
    linear_sites = {site.name: site for site in sites if site.matrices[0].expert is None}
    stacks = {site.matrices[0].parameter.rpartition(".")[0] for site in sites if site.matrices[0].expert is not None}
    watched = {*linear_sites, *stacks}
    reached: set[str] = set()

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        reached.clear()

    def note_reached(name: str) -> None:
        reached.add(name)
        if stop_after_last and reached == watched:
            raise StopForward

    def note_linear(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        accumulators[name].add(input_of(args, kwargs))
        note_reached(name)

    def note_experts(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for expert, input_TH, input_TF in experts.routed_inputs(module, args, kwargs):
            accumulators[f"{name}.{expert}.{experts.up_name(module)}"].add(input_TH)
            accumulators[f"{name}.{expert}.down_proj"].add(input_TF)
        note_reached(name)

    with (
        block.register_forward_pre_hook(start),
        pre_hooks({name: block.get_submodule(name) for name in linear_sites}, note_linear),
        pre_hooks({name: block.get_submodule(name) for name in stacks}, note_experts),
    ):
        yield
