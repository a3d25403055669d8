"""Low-rank parts of sequential variants: later blocks see them, and a killed run resumes to the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscal.models import ModelSource, VariantWriter, adapter, load_variant
from crosscal.progress import silent
from crosscal.stages.compress import RunContext, compress_sequential, publish_variant
from crosscal.store import Store
from crosscal.variants import Variant
from tests.helpers.low_rank_variants import EORA, GPTQ, context_of, folder_of, recipe
from tests.helpers.tiny_run import tiny_source, windows
from tests.helpers.written_models import contents

pytestmark = pytest.mark.usefixtures("quick_disk")
SEQUENTIAL = [
    recipe("sequential", ("sparsegpt", {"sparsity": 0.5}), EORA, upstream="sequential"),
    recipe("sequential-packed", GPTQ, EORA, upstream="sequential"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, ModelSource]:
    dtypes = (torch.float32, torch.bfloat16)
    return {dtype: tiny_source(tmp_path_factory.mktemp("model"), dtype) for dtype in dtypes}


def sequentially(context: RunContext, each: Variant) -> None:
    compress_sequential(context, each, batch_tokens=64, report=silent)
    publish_variant(context, each)


def test_later_blocks_see_the_low_rank_parts_before_them(tmp_path: Path, sources: dict) -> None:
    """The moments of a sequential walk equal those of the loaded model's inputs."""
    source = sources[torch.float32]
    context, each = context_of(tmp_path / "run", source, Store(tmp_path / "home")), SEQUENTIAL[0]
    sequentially(context, each)
    model, inputs = load_variant(folder_of(context, each)), []
    model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_pre_hook(
        lambda module, args: inputs.append(args[0])
    )
    (part,) = context.samples["legal", 0].calibration.parts
    with torch.no_grad():
        model(windows(6, seed=2, high=100)[:-2])
    inputs_TI = inputs[0].flatten(0, 1).double()
    upstream = {a.provenance["upstream"] for a in context.cached.store.list("moments")} - {"dense"}
    (name,) = upstream
    cached = type(context.cached)(context.cached.store, context.cached.model, name, context.cached.dtype)
    site = next(site for site in cached.sites(1) or () if site.name == "self_attn.q_proj")
    gram_II = cached.read(part.key, 1, site).gram_II.double()
    torch.testing.assert_close(gram_II, inputs_TI.mT @ inputs_TI, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("each", "dtype"),
    list(zip(SEQUENTIAL, (torch.float32, torch.bfloat16), strict=True)),
    ids=("sparse", "packed-bfloat16"),
)
@pytest.mark.parametrize("at", ["before the adapter", "between adapter and block", "after the block"])
def test_a_killed_sequential_run_goes_on_to_the_same_model(
    tmp_path: Path, sources: dict, each: Variant, dtype: torch.dtype, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources[dtype]
    undisturbed = context_of(tmp_path / "undisturbed", source, Store(tmp_path / "another home"))
    sequentially(undisturbed, each)
    context = context_of(tmp_path / "killed", source, Store(tmp_path / "home"))
    whole, written = adapter.save_tensors, VariantWriter.write_block

    def die_at(tensors: Mapping[str, Tensor], file: Path) -> None:
        if file.name == "block-00001.safetensors":
            if at == "between adapter and block":
                whole(tensors, file)
            raise KeyboardInterrupt
        whole(tensors, file)

    def die_after(self: VariantWriter, block: int, *args: Any, **more: Any) -> None:
        written(self, block, *args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if at == "after the block":
            patched.setattr(VariantWriter, "write_block", die_after)
        else:
            patched.setattr(adapter, "save_tensors", die_at)
        with pytest.raises(KeyboardInterrupt):
            sequentially(context, each)
    sequentially(context, each)
    assert contents(tmp_path / "killed" / "models") == contents(tmp_path / "undisturbed" / "models")
