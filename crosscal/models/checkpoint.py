"""Writes a compressed variant of a model as a checkpoint that transformers loads, and loads it back.

block-00003.safetensors     a block, its unchanged tensors included; each may come from another machine
adapter/                    low-rank parts that are added to linears (`adapter.py`), where there are any
outside-00000.safetensors   embeddings, norm, head, and what the model has no place for: byte for byte the source's
config.json, tokenizer …    the source's
model.safetensors.index.json   written last: a folder without it is not a model

Tensors have the names that they have in the source's checkpoint, whatever class of transformers reads them: names(out)
= names(in), but for a packed linear, whose weight gives way to its packed parts, and the experts beside such linears.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from crosscal.errors import ModelError, NotFinite
from crosscal.files import whole_file, write_whole
from crosscal.models import adapter
from crosscal.models.building import ONE_AT_A_TIME
from crosscal.models.export import PACKED, unpacked_weight_OI
from crosscal.models.source import ModelSource
from crosscal.models.tensor_files import save_tensors
from crosscal.models.weights import AGAIN, INDEX, Weights, tensor_names
from crosscal.statistics.finite import all_finite

SHARD_BYTES = 2**30
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files beside the weights that a variant takes over: tokenizer, generation defaults, terms of use."""


class VariantWriter:
    """One variant in one folder. Blocks may be written in any order, by several processes, and over several tries."""

    def __init__(self, folder: Path, source: ModelSource) -> None:
        self.folder, self.source = folder, source
        self._skeleton = source.weights.model  # for names and shapes only
        self._adapter = adapter.AdapterWriter(folder, source)
        folder.mkdir(parents=True, exist_ok=True)

    def has_block(self, block: int) -> bool:
        """Whether the block's file is there; files appear complete."""
        return self._block_file(block).is_file()

    def write_block(
        self, block: int, changed: Mapping[str, Tensor], *, dense: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a block with some tensors changed (names inside the block); the others are copied from `dense`, the
        block as the source stores it, which is read if it is not at hand.

        A changed parameter is stored in the dtype the source stores it in. A linear may be replaced by its packed
        tensors (`export.packed_tensors`), and have factors of a low-rank part (`adapter.factors`), which are written
        first. Raises `NotFinite` and `ModelError` naming the tensor.
        """
        name = self.source.block_name(block)
        factors = {key: value for key, value in changed.items() if adapter.is_factor(key)}
        changed = {key: value for key, value in changed.items() if key not in factors}
        self._adapter.write_block(block, factors)
        tensors = dict(self.source.load_block(block) if dense is None else dense)
        packed = {key: value for key, value in changed.items() if key.rpartition(".")[2] in PACKED}
        for key, value in changed.items():
            where = f"{name}.{key}"
            dense_key = f"{key.rpartition('.')[0]}.weight" if key in packed else key
            if dense_key not in tensors or (key not in packed and value.shape != tensors[key].shape):
                raise ModelError("the block holds no tensor of this name and shape", where=where, got=f"{value.shape}")
            if key not in packed:
                tensors[key] = value.detach().to("cpu", tensors[key].dtype)
            if value.is_floating_point() and not all_finite(value if key in packed else tensors[key]):
                raise NotFinite("a compressed tensor is not finite in the checkpoint's dtype", where=where)
        save_tensors(self._named(block, tensors, packed), self._block_file(block))

    def _named(self, block: int, dense: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors under the names of the source's checkpoint."""
        weights, prefix = self.source.weights, f"{self.source.block_name(block)}."
        dropped = {f"{key.rpartition('.')[0]}.weight" for key in packed}
        kept = {f"{prefix}{key}": value for key, value in dense.items() if key not in dropped}
        named: dict[str, Tensor] = {}
        for key, value in packed.items():
            linear, _, part = key.rpartition(".")
            named[weights.key_of_part(f"{prefix}{linear}.weight", part)] = value
        if packed:
            # In a quantized checkpoint transformers takes experts in the hub's spelling, one tensor per expert, to be
            # packed, which only linears can be here: they stay stacked, as modules hold them.
            stacked = {key: value for key, value in kept.items() if weights.is_converted(key)}
            named.update({self.source.name_when_loaded(key): value for key, value in stacked.items()})
            kept = {key: value for key, value in kept.items() if key not in stacked}
        return named | weights.in_checkpoint(kept)

    def adopt_block(self, block: int, shard: Path, adapter_file: Path | None = None) -> None:
        """Take over a block's file that was written elsewhere, and its factors from the adapter's file there."""
        file = self._block_file(block)
        self._adapter.adopt_block(block, adapter_file)
        with whole_file(file) as aside:
            shutil.copyfile(shard, aside)

    def read_block(self, block: int, *, bits: int | None = None) -> dict[str, Tensor]:
        """A written block's tensors by their names inside it; linears packed with `bits` as the weights they mean, and
        low-rank parts added."""
        file, prefix = self._block_file(block), f"{self.source.block_name(block)}."
        written = Weights(dict.fromkeys(tensor_names(file), file), self._skeleton)
        stored = written.stored([key for key in written.files if key.rpartition(".")[2] in PACKED])
        dense: dict[str, Tensor] = {}
        for linear in {key.rpartition(".")[0] for key in stored}:
            if bits is None:
                raise ModelError("the block was written packed; reading it takes its bits", where=str(file))
            packed, scale_OG, shape = (stored[f"{linear}.{part}"] for part in PACKED)
            dense[written.target_of(f"{linear}.weight")] = unpacked_weight_OI(packed, scale_OG, shape, bits)
        expected = set(self._skeleton.state_dict()) - set(dense)
        dense.update(written.load(lambda key: key.startswith(prefix) and key in expected))
        return self._adapter.added(block, {key.removeprefix(prefix): value for key, value in dense.items()})

    def finish(self, quantization: Mapping[str, Any] | None = None) -> None:
        """Write what lies outside the blocks, then publish the variant by writing its index.

        `quantization`: what `export.quantization_config` gives; its `ignore` list is completed with every linear that
        was written dense.
        """
        unwritten = [block for block in range(self.source.blocks) if not self.has_block(block)]
        if unwritten:
            raise ModelError("blocks are not written yet", where=str(self.folder), got=str(unwritten))
        weights = self.source.weights
        inside = weights.keys_of(lambda name: not self.source.is_outside(name))
        for number, keys in enumerate(_shards(weights, sorted(weights.files.keys() - inside))):
            file = self.folder / f"outside-{number:05d}.safetensors"
            if not file.is_file():
                save_tensors(weights.stored(keys), file)
        _copy_companions(self.source.path, self.folder)
        weight_map = {
            key: file.name for file in sorted(self.folder.glob("*.safetensors")) for key in tensor_names(file)
        }
        self._adapter.finish()
        self._write_config(quantization, weight_map)
        total_bytes = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        _write_json(self.folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})

    def _write_config(self, quantization: Mapping[str, Any] | None, weight_map: Mapping[str, str]) -> None:
        config = json.loads((self.source.path / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # it would point at code that is not copied
        if quantization is not None:
            packed = [key.removesuffix("_packed") for key in weight_map if key.endswith(".weight_packed")]
            ignore = {*quantization.get("ignore", ()), *self.source.linears_besides(packed)}
            config["quantization_config"] = {**quantization, "ignore": sorted(ignore)}
        _write_json(self.folder / "config.json", config)

    def _block_file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"


def load_variant(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a checkpoint with dense weights, packed ones unpacked; low-rank parts are added to what linears give.

    Raises `ModelError` unless every tensor was found: transformers fills one it does not find with random numbers and a
    warning.
    """
    if not (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        raise ModelError("this is not a complete model", where=str(folder), got=f"no {INDEX}", do="Finish writing it.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None):
            config.quantization_config["dequantize"] = True
        with ONE_AT_A_TIME:
            model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
                folder,
                config=config,
                dtype=dtype or "auto",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError("the checkpoint cannot be loaded", where=str(folder), got=str(error), do=AGAIN) from error
    lost = sorted(str(key) for problem in ("missing_keys", "mismatched_keys") for key in report[problem])
    if lost:
        raise ModelError("tensors of the model are not in the checkpoint", where=str(folder), got=", ".join(lost[:4]))
    adapter.attach(model, folder)
    return model.eval().requires_grad_(False).to(device)


def _shards(weights: Weights, keys: list[str]) -> Iterator[list[str]]:
    """Groups of tensors of at most `SHARD_BYTES`, or of one larger tensor."""
    shard: list[str] = []
    held_bytes = 0
    for key in keys:
        tensor_bytes = weights.bytes_of(key)
        if shard and held_bytes + tensor_bytes > SHARD_BYTES:
            yield shard
            shard, held_bytes = [], 0
        shard.append(key)
        held_bytes += tensor_bytes
    if shard:
        yield shard


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=2, sort_keys=True) + "\n")
