"""The low-rank parts of a variant, stored beside its checkpoint as a LoRA adapter that PEFT and vLLM load.

adapter/block-00003.safetensors       factors of one block until the model is finished; written before the block's file
adapter/adapter_model.safetensors     factors of all blocks, once the model is finished
adapter/adapter_config.json           the linears, and a scale of 1

    output = V x + scale · B A x,   lora_A = A = R [K, I],   lora_B = B = L [O, K],   scale = lora_alpha / r = 1

Low-rank parts are never merged into the matrix: its zeros or integers would be lost. Names are those of the modules of
`AutoModelForCausalLM`. A matrix without its own module (one expert of a stack) cannot have a low-rank part.

Shapes: O outputs, I inputs, K rank.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from crosscal.errors import ModelError, NotFinite
from crosscal.files import write_whole
from crosscal.models import experts
from crosscal.models.sites import MatrixRef, input_of, is_linear
from crosscal.models.source import ModelSource
from crosscal.models.tensor_files import ADAPTER, ADAPTER_CONFIG, save_tensors, some_of
from crosscal.statistics.finite import all_finite

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's name of the model that it wraps."""
RIGHT_KI, LEFT_OK = ".lora_A.weight", ".lora_B.weight"
FACTORS = ("low_rank_right_KI", "low_rank_left_OK")
"""Names of the buffers of a linear that adds them."""


def is_factor(key: str) -> bool:
    """Whether a tensor's name is that of a low-rank factor."""
    return key.endswith((RIGHT_KI, LEFT_OK))


def factors(matrix: MatrixRef, left_OK: Tensor, right_KI: Tensor) -> dict[str, Tensor]:
    """Return the named factors of a matrix's low-rank part L R. Raises `ModelError` for one expert of a stack."""
    if matrix.expert is not None:
        raise ModelError(
            "an adapter cannot name one expert of a stack, so its low-rank part could not be loaded",
            where=matrix.name,
            do="Leave out the steps that add one.",
        )
    parts = {f"{matrix.name}{RIGHT_KI}": right_KI, f"{matrix.name}{LEFT_OK}": left_OK}
    return {name: part.detach().cpu().contiguous() for name, part in parts.items()}


def stacked_experts(model: nn.Module) -> list[str]:
    """Return the names of modules with stacked experts, whose matrices an adapter cannot name."""
    return [name for name, module in model.named_modules() if experts.is_experts(module)]


def with_low_rank(stored: Tensor, left_OK: Tensor, right_KI: Tensor, *, transposed: bool) -> Tensor:
    """Return V + L R in V's dtype and layout, only to compute with (e.g. the inputs of later blocks), never stored."""
    low_rank_OI = left_OK.float() @ right_KI.float()
    return (stored.float() + (low_rank_OI.mT if transposed else low_rank_OI)).to(stored.dtype)


class AdapterWriter:
    """Writes the adapter of one variant, block by block."""

    def __init__(self, folder: Path, source: ModelSource) -> None:
        self.folder, self.source = folder / ADAPTER, source

    def write_block(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a block's factors (names inside the block), before the block's own file is written. Earlier factors of
        the block are overwritten, also by an empty mapping. Raises `NotFinite`."""
        prefix = f"{self.source.block_name(block)}."
        for key, value in tensors.items():
            if not all_finite(value):
                raise NotFinite("a low-rank part is not finite in the checkpoint's dtype", where=f"{prefix}{key}")
        if tensors or self.folder.is_dir():
            save_tensors({f"{PREFIX}{prefix}{key}": value for key, value in tensors.items()}, self._part(block))

    def adopt_block(self, block: int, file: Path | None) -> None:
        """Copy a block's factors from an adapter file that was written elsewhere; None: the block has no factors."""
        self.write_block(block, {} if file is None else self._of_block(file, block))

    def read_block(self, block: int) -> dict[str, Tensor]:
        """Read a written block's factors from its own file, or from that of all blocks."""
        file = next((file for file in (self._part(block), self.folder / WEIGHTS) if file.is_file()), None)
        return {} if file is None else self._of_block(file, block)

    def added(self, block: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's parameters with its low-rank parts added."""
        parts = self.read_block(block)
        module = self._skeleton.get_submodule(self.source.block_name(block))
        found = dict(stored)
        for name in (key.removesuffix(LEFT_OK) for key in parts if key.endswith(LEFT_OK)):
            left_OK, right_KI, weight = parts[f"{name}{LEFT_OK}"], parts[f"{name}{RIGHT_KI}"], f"{name}.weight"
            transposed = isinstance(module.get_submodule(name), Conv1D)
            found[weight] = with_low_rank(stored[weight], left_OK, right_KI, transposed=transposed)
        return found

    def finish(self) -> None:
        """Merge the blocks' factors into one file and write the adapter's config.

        Can be interrupted and called again: the blocks' files are deleted once the merged file and config exist.
        """
        if not self.folder.is_dir():
            return
        blocks = range(self.source.blocks)
        names = {block: f"{PREFIX}{self.source.block_name(block)}." for block in blocks}
        tensors = {f"{names[block]}{key}": value for block in blocks for key, value in self.read_block(block).items()}
        if not tensors:
            shutil.rmtree(self.folder)
            return
        save_tensors(tensors, self.folder / WEIGHTS)
        config = config_of(tensors, transposed=any(isinstance(module, Conv1D) for module in self._skeleton.modules()))
        write_whole(self.folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        for block in blocks:
            self._part(block).unlink(missing_ok=True)

    @property
    def _skeleton(self) -> nn.Module:
        return self.source.weights.model

    def _of_block(self, file: Path, block: int) -> dict[str, Tensor]:
        prefix = f"{PREFIX}{self.source.block_name(block)}."
        return {key.removeprefix(prefix): value for key, value in _read(file, prefix).items()}

    def _part(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of a finished model's adapter, or an empty list if it has no adapter."""
    return [file for name in (ADAPTER_CONFIG, WEIGHTS) if (file := folder / ADAPTER / name).is_file()]


def config_of(tensors: Mapping[str, Tensor], *, transposed: bool) -> dict[str, Any]:
    """Return the content of `adapter_config.json`. `transposed`: linears are stored as [I, O] (Conv1D, GPT-2).

    No base model is named: it is the parent folder, and a path would be valid from one working directory only.
    """
    ranks = {key.removesuffix(RIGHT_KI): len(value) for key, value in tensors.items() if key.endswith(RIGHT_KI)}
    ranks = {key.removeprefix(PREFIX): rank for key, rank in sorted(ranks.items())}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
    }


def attach(model: nn.Module, folder: Path) -> None:
    """Make the linears of a loaded checkpoint add their low-rank parts, if the folder has an adapter.

    They are computed separately from the matrix, as in PEFT: in bfloat16 the sum V + L R would round the low-rank part
    away. Raises `ModelError` for an adapter that does not fit the model.
    """
    if adapter_files(folder):
        _attach(model, folder, PREFIX)


@contextmanager
def attached_to_block(block: nn.Module, folder: Path, name: str) -> Iterator[None]:
    """Context: the linears of one block add their low-rank parts. `name`: of the block in the whole model. The block
    must have its weights."""
    added = _attach(block, folder, f"{PREFIX}{name}.") if adapter_files(folder) else []
    try:
        yield
    finally:
        for linear, handle in added:
            handle.remove()
            for factor in FACTORS:
                delattr(linear, factor)


def check_in_blocks(folder: Path, blocks: str) -> None:
    """Raise `ModelError` for a low-rank part outside the blocks. `blocks`: name of their list in the model."""
    outside = [key for key in _read(folder / ADAPTER / WEIGHTS) if not key.startswith(f"{PREFIX}{blocks}.")]
    if outside:
        raise ModelError("low-rank parts outside the blocks", where=str(folder / ADAPTER), got=some_of(outside))


def _attach(module: nn.Module, folder: Path, prefix: str) -> list[tuple[nn.Module, RemovableHandle]]:
    """Attach the factors whose names start with `prefix` to the linears of a module."""
    tensors, modules, added = _read(folder / ADAPTER / WEIGHTS, prefix), dict(module.named_modules()), []
    names = sorted({key.removeprefix(prefix).removesuffix(RIGHT_KI).removesuffix(LEFT_OK) for key in tensors})
    for name in names:
        right_KI, left_OK = (tensors.get(f"{prefix}{name}{part}") for part in (RIGHT_KI, LEFT_OK))
        linear = modules.get(name)
        if right_KI is None or left_OK is None or linear is None or not is_linear(linear):
            raise ModelError("the adapter does not fit the model", where=str(folder / ADAPTER), got=name)
        added.append((linear, _add(linear, left_OK, right_KI)))
    return added


def _add(linear: nn.Module, left_OK: Tensor, right_KI: Tensor) -> RemovableHandle:
    like = next(parameter for parameter in linear.parameters() if parameter.is_floating_point())
    for factor, value in zip(FACTORS, (right_KI, left_OK), strict=True):
        linear.register_buffer(factor, value.to(like.device, like.dtype), persistent=False)

    def add(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        inner = functional.linear(input_of(args, kwargs), linear.low_rank_right_KI)
        return output + functional.linear(inner, linear.low_rank_left_OK)

    return linear.register_forward_hook(add, with_kwargs=True)


def _read(file: Path, prefix: str = PREFIX) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError("the adapter cannot be read", where=str(file), got=str(error)) from error
