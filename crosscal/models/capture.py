"""Feeds the inputs of a block's sites to moment accumulators while the block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from crosscal.models import experts
from crosscal.models.sites import Site, input_of, pre_hooks
from crosscal.statistics.moments import MomentsAccumulator


@contextmanager
def capture(block: nn.Module, sites: Sequence[Site], accumulators: Mapping[str, MomentsAccumulator]) -> Iterator[None]:
    """Inside, every forward pass of the block adds the inputs of each site to `accumulators[site.name]`.

    A stacked expert gets the rows of the tokens routed to it; its inner activations are computed once more for that.
    """
    linear_sites = {site.name: site for site in sites if site.matrices[0].expert is None}
    stacks = {site.matrices[0].parameter.rpartition(".")[0] for site in sites if site.matrices[0].expert is not None}

    def note_linear(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        accumulators[name].add(input_of(args, kwargs))

    def note_experts(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for expert, input_TH, input_TF in experts.routed_inputs(module, args, kwargs):
            accumulators[f"{name}.{expert}.{experts.up_name(module)}"].add(input_TH)
            accumulators[f"{name}.{expert}.down_proj"].add(input_TF)

    with (
        pre_hooks({name: block.get_submodule(name) for name in linear_sites}, note_linear),
        pre_hooks({name: block.get_submodule(name) for name in stacks}, note_experts),
    ):
        yield
