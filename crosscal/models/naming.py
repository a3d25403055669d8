"""What transformers makes of the names in a checkpoint when a class of models loads it.

Its own rules decide: renamings of older or other spellings, and conversions, which make one tensor of a module from
several of the checkpoint. (Some of what is imported for that is not public in transformers; a release that moves it
fails at import, not in silence.)
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from crosscal.models.export import PACKED, quantization_config


class Naming:
    """Where each tensor of a checkpoint arrives in `model`, a skeleton."""

    def __init__(self, model: PreTrainedModel, *, packed: bool = False) -> None:
        """`packed`: by the rules for quantized checkpoints, whose linears have packed parts in place of a weight."""
        self.prefix = model.base_model_prefix
        self.expected = dict(model.state_dict())
        quantizer = None
        if packed:
            quantizer = CompressedTensorsHfQuantizer(CompressedTensorsConfig(**quantization_config(4, None, [])))
            linears = [name.removesuffix(".weight") for name in self.expected if name.endswith(".weight")]
            quantizer.validate_environment()
            self.expected |= {f"{name}.{part}": self.expected[f"{name}.weight"] for name in linears for part in PACKED}
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self.renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]

    def place(self, key: str) -> tuple[str, str | None]:
        """(the model's name, the pattern of the conversion on the way there) of a checkpoint's tensor."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.expected)
        if name not in self.expected and key in self.expected:
            return key, None  # a rule meant for an older spelling matched a name that is already right
        return name, pattern
