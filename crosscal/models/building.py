"""Build models with transformers while other threads of the process work.

transformers changes global state while it builds or loads a model: torch's default dtype, `tie_weights` of every model
class, functions of `torch.nn.init`, `torch.linspace`. If two such changes interleave, the wrong state is restored
permanently, and a module built in the meantime has the wrong dtype or untied weights. Therefore only one thread at a
time builds or loads a model, and building a skeleton (the most frequent case) changes no state visible to other
threads: thread-local function modes set the device and dtype of new tensors.
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from crosscal.errors import UnsupportedModel

ONE_AT_A_TIME = threading.RLock()
"""Lock to hold while transformers builds or loads a model."""

_FACTORIES = {torch.empty, torch.ones, torch.zeros, torch.full, torch.eye, torch.linspace, torch.rand, torch.randn}
_BY_VALUE = {torch.tensor, torch.as_tensor, torch.arange}
"""Their dtype follows their arguments: integers stay integers."""
_FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_, Tensor.zero_}
"""Skipped for parameters without storage, where they would take half the time of building a model."""


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the causal language model class of a config, and import its module.

    For a multimodal config without such a class, return the class in its `architectures`: only the language model
    inside is calibrated, and the rest is unchanged. Raises `UnsupportedModel`.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    is_whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    for kind in (getattr(transformers, name, None) for name in config.architectures or ()):
        if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel) or kind.config_class is not type(config):
            continue
        if is_whole or kind.__name__.endswith("ForCausalLM"):
            return kind
    raise UnsupportedModel(
        "not a causal language model that transformers knows", got=f"model type {config.model_type!r}"
    )


def loading_class(config: PretrainedConfig) -> Any:
    """Return the class whose `from_pretrained` loads the model of `causal_class` with its weights."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else causal_class(config)


def build_skeleton(config: PretrainedConfig, kind: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with all parameters on the meta device; computed buffers (rotary tables) are real, as after
    loading. Modifies `config`."""
    text_config = config.sub_configs.get("text_config")
    if text_config is not None and kind.config_class == text_config:
        config = config.get_text_config()
    # eager: other implementations of stacked experts have no float64 kernels and no deterministic order of sums
    with ONE_AT_A_TIME, torch.device("meta"), _Unfilled(dtype):
        model = kind._from_config(config, dtype=None, experts_implementation="eager")
    config.dtype = dtype
    for sub_config in config.sub_configs:
        if (of_part := getattr(config, sub_config, None)) is not None:
            of_part.dtype = dtype
    _compute_buffers(model)
    return model.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """In this thread, new floating-point tensors have `dtype` if none is requested, and tensors on the meta device are
    not filled."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        made = func(*args, **kwargs)
        is_free = func in _FACTORIES or (func in _BY_VALUE and not any(isinstance(arg, Tensor) for arg in args))
        is_default = is_free and kwargs.get("dtype") is None and made.dtype == torch.get_default_dtype()
        return made.to(self._dtype) if is_default else made


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute buffers as `from_pretrained` does: with the model family's own `_init_weights`."""
    owners: dict[str, PreTrainedModel] = {
        name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)
    }
    computed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key in (key for key in module._buffers if key in module._non_persistent_buffers_set):
            if (buffer := module._buffers[key]) is not None and buffer.is_meta:
                unset = torch.nan if buffer.is_floating_point() else 0
                module._buffers[key] = computed[f"{name}.{key}"] = torch.full_like(buffer, unset, device="cpu")
    # A buffer may be filled by its own module or by an enclosing one (Falcon-H1: the model, for all its blocks).
    around = {path.rpartition(".")[0] for path in computed}
    for name, module in model.named_modules():
        if any(f"{path}.".startswith(f"{name}." if name else "") for path in around):
            owner_of(name, owners)._init_weights(module)
    for path, buffer in computed.items():
        if buffer.is_floating_point() and buffer.isnan().all() and buffer.numel():
            raise UnsupportedModel("transformers does not initialise this buffer", where=path)


def owner_of(name: str, owners: dict[str, PreTrainedModel]) -> PreTrainedModel:
    """Return the innermost `PreTrainedModel` that contains a module."""
    path = max((path for path in owners if not path or f"{name}.".startswith(f"{path}.")), key=len)
    return owners[path]


def place_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move the computed buffers of a skeleton to the device that will run it."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)
