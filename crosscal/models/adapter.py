"""The low-rank parts of a variant, beside its checkpoint: a LoRA adapter as PEFT and vLLM load it.

adapter/block-00003.safetensors       of one block, while the model is being made; written before the block's own file
adapter/adapter_model.safetensors     of all blocks, once the model is finished
adapter/adapter_config.json           which linears, and that the factors are added as they are

    output = V x + scale · B A x,   lora_A = A = R [K, I],   lora_B = B = L [O, K],   scale = lora_alpha / r = 1

Never merged into the matrix: that would undo its zeros or integers. Names are those of the modules of
`AutoModelForCausalLM`: a matrix without a module of its own, one expert of a stack, cannot have a low-rank part.

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
"""What PEFT calls the model that it wraps."""
RIGHT_KI, LEFT_OK = ".lora_A.weight", ".lora_B.weight"
FACTORS = ("low_rank_right_KI", "low_rank_left_OK")
"""What a linear that adds them holds them as."""


def is_factor(key: str) -> bool:
    """Whether a tensor's name is that of a factor."""
    return key.endswith((RIGHT_KI, LEFT_OK))


def factors(matrix: MatrixRef, left_OK: Tensor, right_KI: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for the low-rank part of a matrix, by its name in the block. Raises `ModelError`."""
    if matrix.expert is not None:
        raise ModelError(
            "an adapter cannot name one expert of a stack, so its low-rank part could not be loaded",
            where=matrix.name,
            do="Leave out the steps that add one.",
        )
    parts = {f"{matrix.name}{RIGHT_KI}": right_KI, f"{matrix.name}{LEFT_OK}": left_OK}
    return {name: part.detach().cpu().contiguous() for name, part in parts.items()}


def stacked_experts(model: nn.Module) -> list[str]:
    """Modules of a model whose matrices an adapter cannot name."""
    return [name for name, module in model.named_modules() if experts.is_experts(module)]


def with_low_rank(stored: Tensor, left_OK: Tensor, right_KI: Tensor, *, transposed: bool) -> Tensor:
    """V + L R as one matrix in V's dtype and layout, for inputs of later blocks: it is only computed with."""
    low_rank_OI = left_OK.float() @ right_KI.float()
    return (stored.float() + (low_rank_OI.mT if transposed else low_rank_OI)).to(stored.dtype)


class AdapterWriter:
    """The adapter of one variant, block by block."""

    def __init__(self, folder: Path, source: ModelSource) -> None:
        self.folder, self.source = folder / ADAPTER, source

    def write_block(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block's factors (names inside the block): to be called before the block's own file is written.
        Without any, nothing is left of what was written of it earlier. Raises `NotFinite`."""
        prefix = f"{self.source.block_name(block)}."
        for key, value in tensors.items():
            if not all_finite(value):
                raise NotFinite("a low-rank part is not finite in the checkpoint's dtype", where=f"{prefix}{key}")
        if tensors or self.folder.is_dir():
            save_tensors({f"{PREFIX}{prefix}{key}": value for key, value in tensors.items()}, self._part(block))

    def adopt_block(self, block: int, file: Path | None) -> None:
        """Take over a block's factors from an adapter's file that was written elsewhere; None: it has none."""
        self.write_block(block, {} if file is None else self._of_block(file, block))

    def read_block(self, block: int) -> dict[str, Tensor]:
        """A written block's factors: from its own file, or that of all blocks."""
        file = next((file for file in (self._part(block), self.folder / WEIGHTS) if file.is_file()), None)
        return {} if file is None else self._of_block(file, block)

    def added(self, block: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's parameters with its low-rank parts."""
        parts = self.read_block(block)
        module = self._skeleton.get_submodule(self.source.block_name(block))
        found = dict(stored)
        for name in (key.removesuffix(LEFT_OK) for key in parts if key.endswith(LEFT_OK)):
            left_OK, right_KI, weight = parts[f"{name}{LEFT_OK}"], parts[f"{name}{RIGHT_KI}"], f"{name}.weight"
            transposed = isinstance(module.get_submodule(name), Conv1D)
            found[weight] = with_low_rank(stored[weight], left_OK, right_KI, transposed=transposed)
        return found

    def finish(self) -> None:
        """Put the blocks' factors into one file, and say how they are to be read.

        May be interrupted and called again: files of blocks go when what replaces them is there.
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
    """The files of a finished model's adapter; none where it has none."""
    return [file for name in (ADAPTER_CONFIG, WEIGHTS) if (file := folder / ADAPTER / name).is_file()]


def config_of(tensors: Mapping[str, Tensor], *, transposed: bool) -> dict[str, Any]:
    """What `adapter_config.json` says of factors. `transposed`: the linears are GPT-2's, which lie as [I, O].

    No base model is named: a path would hold only from one working directory, and the base is the folder around.
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
    """Make the linears of a loaded checkpoint add their low-rank parts, where the folder has an adapter.

    Computed beside the matrix, as PEFT does: in bfloat16 a sum would round the low-rank part away. Raises `ModelError`
    for an adapter that does not fit the model.
    """
    if adapter_files(folder):
        _attach(model, folder, PREFIX)


@contextmanager
def attached_to_block(block: nn.Module, folder: Path, name: str) -> Iterator[None]:
    """Inside, the linears of one block, which has its weights and in the whole model this name, add theirs."""
    added = _attach(block, folder, f"{PREFIX}{name}.") if adapter_files(folder) else []
    try:
        yield
    finally:
        for linear, handle in added:
            handle.remove()
            for factor in FACTORS:
                delattr(linear, factor)


def check_in_blocks(folder: Path, blocks: str) -> None:
    """Raises `ModelError` for a low-rank part outside the blocks, which are items of the list of this name."""
    outside = [key for key in _read(folder / ADAPTER / WEIGHTS) if not key.startswith(f"{PREFIX}{blocks}.")]
    if outside:
        raise ModelError("low-rank parts outside the blocks", where=str(folder / ADAPTER), got=some_of(outside))


def _attach(module: nn.Module, folder: Path, prefix: str) -> list[tuple[nn.Module, RemovableHandle]]:
    """To the linears of a module whose factors have names that begin so."""
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
