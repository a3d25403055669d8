"""Building models with transformers while other threads of the process work.

transformers changes the process while it builds or loads a model: torch's default dtype, `tie_weights` of every model
class, functions of `torch.nn.init`, `torch.linspace`. Two such changes that interleave restore the wrong thing for
good, and whoever builds a module meanwhile gets it in another dtype, or untied. So one thread at a time builds or loads
here, and a skeleton, which is built most often, changes nothing that another thread could see: the device and the dtype
of what it creates are set by function modes, which are each thread's own.
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
"""Held by whoever lets transformers build or load a model."""

_FACTORIES = {torch.empty, torch.ones, torch.zeros, torch.full, torch.eye, torch.linspace, torch.rand, torch.randn}
_BY_VALUE = {torch.tensor, torch.as_tensor, torch.arange}
"""Their dtype follows what they are given: integers stay integers."""
_FILLS = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_, Tensor.zero_}
"""Spent on a parameter without storage, they take half the time of building."""


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of causal language models that a config stands for; loads its module.

    Of a multimodal config that has no such class the one that its `architectures` name: the language model inside is
    what is walked, and the rest of it stays as it is. Raises `UnsupportedModel`.
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
    """What `from_pretrained` of gives the same model with its weights."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else causal_class(config)


def build_skeleton(config: PretrainedConfig, kind: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """A model with every parameter on the meta device; computed buffers (rotary tables) are real, as loading makes
    them. `config` is edited."""
    text_config = config.sub_configs.get("text_config")
    if text_config is not None and kind.config_class == text_config:
        config = config.get_text_config()
    # eager: other implementations of stacked experts have no float64 kernels and no fixed order of sums
    with ONE_AT_A_TIME, torch.device("meta"), _Unfilled(dtype):
        model = kind._from_config(config, dtype=None, experts_implementation="eager")
    config.dtype = dtype
    for sub_config in config.sub_configs:
        if (of_part := getattr(config, sub_config, None)) is not None:
            of_part.dtype = dtype
    _compute_buffers(model)
    return model.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """In this thread, new floating-point tensors have `dtype` where none is asked for, and those on the meta device are
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
    """Give computed buffers their values in the way that `from_pretrained` does: by the family's own initialisation."""
    owners: dict[str, PreTrainedModel] = {
        name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)
    }
    computed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key in (key for key in module._buffers if key in module._non_persistent_buffers_set):
            if (buffer := module._buffers[key]) is not None and buffer.is_meta:
                unset = torch.nan if buffer.is_floating_point() else 0
                module._buffers[key] = computed[f"{name}.{key}"] = torch.full_like(buffer, unset, device="cpu")
    # A buffer may be filled by its own module or by one around it (Falcon-H1: the model, for all its blocks).
    around = {path.rpartition(".")[0] for path in computed}
    for name, module in model.named_modules():
        if any(f"{path}.".startswith(f"{name}." if name else "") for path in around):
            owner_of(name, owners)._init_weights(module)
    for path, buffer in computed.items():
        if buffer.is_floating_point() and buffer.isnan().all() and buffer.numel():
            raise UnsupportedModel("transformers does not say what this table holds", where=path)


def owner_of(name: str, owners: dict[str, PreTrainedModel]) -> PreTrainedModel:
    """The innermost model that a module belongs to."""
    path = max((path for path in owners if not path or f"{name}.".startswith(f"{path}.")), key=len)
    return owners[path]


def place_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move the computed buffers of a skeleton to the device that will run it."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)
