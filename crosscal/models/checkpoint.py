"""Write a compressed variant of a model as a checkpoint that transformers loads.

block-00003.safetensors     one block, including its unchanged tensors; blocks may be written on different machines
adapter/                    low-rank parts that are added to linears (`adapter.py`), if there are any
outside-00000.safetensors   embeddings, norm, head, and tensors that the model does not contain: unchanged bytes
config.json, tokenizer …    copied from the source; only config.json is adapted
model.safetensors.index.json   written last: a folder without it is not a model

Tensors keep their names in the source's checkpoint, regardless of the transformers class that loads them, with two
exceptions: packed parts replace the weight of a packed linear, and dense experts beside packed linears are renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from crosscal.errors import ModelError, NotFinite
from crosscal.files import whole_file, write_whole
from crosscal.models import adapter
from crosscal.models.export import PACKED, Ints, packed_tensors, unpacked_weight_OI
from crosscal.models.sites import MatrixRef
from crosscal.models.source import ModelSource
from crosscal.models.tensor_files import INDEX, Encoded, save_tensors, tensor_names
from crosscal.models.weights import Weights
from crosscal.statistics.finite import all_finite

SHARD_BYTES = 2**30
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files that are copied along with the weights: tokenizer, generation defaults, terms of use."""


class VariantWriter:
    """Writes one variant to a folder. Blocks may be written in any order, by several processes, in several attempts."""

    def __init__(self, folder: Path, source: ModelSource) -> None:
        self.folder, self.source = folder, source
        self._skeleton = source.weights.model  # for names and shapes only
        self._adapter = adapter.AdapterWriter(folder, source)
        folder.mkdir(parents=True, exist_ok=True)

    def has_block(self, block: int) -> bool:
        """Whether the block's file exists. Files are written atomically."""
        return self._block_file(block).is_file()

    def write_block(
        self,
        block: int,
        changed: Mapping[str, Tensor],
        *,
        packed: Mapping[MatrixRef, Ints] | None = None,
        dense: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a block with some tensors changed (names inside the block). The others are copied from `dense`, the
        block as the source stores it; None: load it.

        A changed parameter is stored in the dtype that it has in the source. `packed`: matrices whose integers are
        stored instead of weights; of a stack of experts all or none (see `Packing`). Factors of low-rank parts
        (`adapter.factors`) are part of `changed` and written first. Raises `NotFinite` and `ModelError`.
        """
        name, packed = self.source.block_name(block), packed or {}
        factors = {key: value for key, value in changed.items() if adapter.is_factor(key)}
        self._adapter.write_block(block, factors)
        tensors = dict(self.source.load_block(block) if dense is None else dense)
        for key, value in changed.items():
            if key in factors:
                continue
            if key not in tensors or value.shape != tensors[key].shape:
                got = f"{tuple(value.shape)}"
                raise ModelError("the block holds no tensor of this name and shape", where=f"{name}.{key}", got=got)
            tensors[key] = value.detach().to("cpu", tensors[key].dtype)
            _check_finite(tensors[key], f"{name}.{key}")
        for matrix in packed:
            if matrix.parameter not in tensors:
                raise ModelError("the block holds no tensor of this name", where=f"{name}.{matrix.parameter}")
        save_tensors(self._named(block, tensors, packed), self._block_file(block))

    def _named(self, block: int, dense: Mapping[str, Tensor], packed: Mapping[MatrixRef, Ints]) -> dict[str, Tensor]:
        """Return a block's tensors, some of them packed, under the names of the source's checkpoint."""
        weights, prefix = self.source.weights, f"{self.source.block_name(block)}."
        by_expert = {(matrix.parameter, matrix.expert): ints for matrix, ints in packed.items()}
        parameters = dict.fromkeys(matrix.parameter for matrix in packed)
        kept = {f"{prefix}{key}": value for key, value in dense.items() if key not in parameters}
        named: dict[str, Tensor] = {}
        for parameter in parameters:
            for linear in self.source.packing.linears(f"{prefix}{parameter}"):
                ints = by_expert.get((parameter, linear.expert))
                if ints is None:
                    raise ModelError("either all experts of a stack are packed, or none", where=linear.name)
                parts = packed_tensors(linear.name, linear.of(ints.ints_OI), linear.of(ints.scale_OG), ints.bits)
                _check_finite(parts[f"{linear.name}.weight_scale"], linear.name)
                named.update(parts)
        if packed:
            stacks, kept = self._stacked(kept)
            named.update(stacks)
        return named | weights.in_checkpoint(kept)

    def _stacked(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Split off the stacks of experts that stay dense beside packed linears, named as in the loading class.

        In a quantized checkpoint transformers assumes that experts stored one by one, as on the hub, are packed."""
        of_stacks = {key: value for key, value in tensors.items() if self.source.weights.is_converted(key)}
        rest = {key: value for key, value in tensors.items() if key not in of_stacks}
        return {self.source.name_when_loaded(key): value for key, value in of_stacks.items()}, rest

    def adopt_block(self, block: int, shard: Path, adapter_file: Path | None = None) -> None:
        """Copy a block's file that was written elsewhere, and its factors from the adapter file there."""
        file = self._block_file(block)
        self._adapter.adopt_block(block, adapter_file)
        with whole_file(file) as aside:
            shutil.copyfile(shard, aside)

    def read_block(self, block: int, *, bits: int | None = None) -> dict[str, Tensor]:
        """Read a written block: name inside the block -> tensor. Linears packed with `bits` are unpacked, and low-rank
        parts are added. Raises `ModelError` for a packed block without `bits`."""
        file, prefix = self._block_file(block), f"{self.source.block_name(block)}."
        files = dict.fromkeys(tensor_names(file), file)
        linears = [key.removesuffix("_packed") for key in files if key.endswith(".weight_packed")]
        if linears and bits is None:
            raise ModelError("the block is packed, so reading it needs its bits", where=str(file))
        encoded = {
            linear: Encoded(tuple(f"{linear.removesuffix('.weight')}.{part}" for part in PACKED), _unpack(bits or 0))
            for linear in linears
        }
        dense = Weights(files, self._skeleton, encoded).load(lambda key: key.startswith(prefix))
        return self._adapter.added(block, {key.removeprefix(prefix): value for key, value in dense.items()})

    def finish(self, quantization: Mapping[str, Any] | None = None) -> None:
        """Write all tensors outside the blocks, then complete the variant by writing its index.

        `quantization`: result of `export.quantization_config`; every linear that was written dense is added to its
        `ignore` list. If all were, `config.json` contains no quantization. Raises `ModelError` if blocks are missing.
        """
        unwritten = [block for block in range(self.source.blocks) if not self.has_block(block)]
        if unwritten:
            raise ModelError("blocks are not written yet", where=str(self.folder), got=str(unwritten))
        self._stack_experts()
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

    def _stack_experts(self) -> None:
        """If only some blocks have packed linears, rewrite the experts of the other blocks as `_stacked` names them.

        This is done last: while a block is written, it is unknown whether others will be packed."""
        files = {block: self._block_file(block) for block in range(self.source.blocks)}
        names = {block: tensor_names(file) for block, file in files.items()}
        is_packed = {block for block, keys in names.items() if any(key.endswith(".weight_packed") for key in keys)}
        split_stack = self.source.weights.stacked_keys()
        for block in files.keys() - is_packed if is_packed else ():
            if not split_stack.isdisjoint(names[block]):
                prefix = f"{self.source.block_name(block)}."
                written = Weights(dict.fromkeys(names[block], files[block]), self._skeleton)
                stacks, rest = self._stacked(written.load(lambda key, prefix=prefix: key.startswith(prefix)))
                save_tensors(stacks | self.source.weights.in_checkpoint(rest), files[block])

    def _write_config(self, quantization: Mapping[str, Any] | None, weight_map: Mapping[str, str]) -> None:
        config = json.loads((self.source.path / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)  # it refers to code that is not copied
        config.pop("quantization_config", None)  # that of a source whose weights were decoded
        packed = [key.removesuffix("_packed") for key in weight_map if key.endswith(".weight_packed")]
        if quantization is not None and packed:
            ignore = {*quantization.get("ignore", ()), *self.source.linears_besides(packed)}
            config["quantization_config"] = {**quantization, "ignore": sorted(ignore)}
        _write_json(self.folder / "config.json", config)

    def _block_file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"


def _check_finite(tensor: Tensor, where: str) -> None:
    if tensor.is_floating_point() and not all_finite(tensor):
        raise NotFinite("a compressed tensor is not finite in the checkpoint's dtype", where=where)


def _unpack(bits: int) -> Callable[..., Tensor]:
    return partial(unpacked_weight_OI, bits=bits)


def _shards(weights: Weights, keys: list[str]) -> Iterator[list[str]]:
    """Yield groups of tensors of at most `SHARD_BYTES` together, or of one larger tensor."""
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
