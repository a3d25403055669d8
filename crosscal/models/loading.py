"""Load a checkpoint, dense or packed, with transformers' `from_pretrained`, and unpack it.

Measurements use models loaded in this standard way, so that a checkpoint which transformers cannot load is never
measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.compressors.model_compressors import model_compressor
from compressed_tensors.quantization.lifecycle import apply
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from crosscal.errors import ModelError
from crosscal.models import adapter
from crosscal.models.building import ONE_AT_A_TIME, loading_class, place_buffers
from crosscal.models.encoded import encoding_of
from crosscal.models.source import ModelSource
from crosscal.models.tensor_files import AGAIN, INDEX, SINGLE

T = TypeVar("T")


def load_variant(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a checkpoint and unpack packed weights to dense ones; linears add low-rank parts to their outputs.

    Raises `ModelError` if transformers fails, or if any tensor is missing: transformers would only warn and initialise
    it randomly.
    """
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        raise ModelError("this is not a complete model", where=str(folder), got=f"no {INDEX}", do="Finish writing it.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if encoding_of(getattr(config, "quantization_config", None)):
            return _decoded(folder, device, dtype)
        with ONE_AT_A_TIME:
            model, report = loading_class(config).from_pretrained(  # a pair, with output_loading_info
                folder,
                dtype=dtype or "auto",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ModelError(
            "the checkpoint cannot be loaded by transformers", where=str(folder), got=got, do=AGAIN
        ) from error
    lost = sorted(str(key) for problem in ("missing_keys", "mismatched_keys") for key in report[problem])
    if lost:
        raise ModelError("tensors of the model are not in the checkpoint", where=str(folder), got=", ".join(lost[:4]))
    _unpack(model, config.dtype if isinstance(config.dtype, torch.dtype) else None)
    if dtype is not None:
        _widen(model, dtype)
    adapter.attach(model, folder)
    return model.eval().requires_grad_(False).to(device)


def _decoded(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a model whose checkpoint is encoded (`encoded.py`), with the same decoded weights as in calibration."""
    source = ModelSource.open(folder)
    model = source.skeleton(dtype or source.dtype)
    tensors = source.weights.load(lambda name: True, dtype=dtype, device=device)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    place_buffers(model, device)
    model.set_experts_implementation(model.get_correct_experts_implementation(None))  # as `from_pretrained` chooses
    return model


def _unpack(model: PreTrainedModel, stored_dtype: torch.dtype | None) -> None:
    """Replace packed linears by plain ones, with weights rounded to the checkpoint's dtype."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    packed = [module for module in model.modules() if hasattr(module, "weight_packed")]
    for module in packed:
        decompress_module(module, leave_decompressed=False)
        weight_OI = module.get_parameter("weight").detach()
        rounded_OI = weight_OI.to(stored_dtype or weight_OI.dtype).to(weight_OI.dtype)
        module.register_parameter("weight", nn.Parameter(rounded_OI, requires_grad=False))
    quantizer.compressor.remove_decompression_hook(model)
    quantizer.remove_quantization_config(model)


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen narrower parameters to `dtype`: unpacked stacks of experts ignore it and have the checkpoint's."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < dtype.itemsize:
            parameter.data = parameter.data.to(dtype)


def without_bars() -> None:
    """Disable the progress bars of compressed-tensors, as `disable_progress_bar` does for transformers. There is no
    option for this, so its `tqdm` is replaced."""
    for module in (apply, model_compressor):
        vars(module)["tqdm"] = _bare


def _bare(items: Iterable[T], **_: Any) -> Iterable[T]:
    return items
