"""Map a checkpoint's tensor names to those of the model class that loads it.

transformers' own rules are applied: renamings of older or different spellings, and conversions, which build one tensor
of a module from several of the checkpoint. (Some of the imports are not part of transformers' public API; a release
that moves them causes an import error rather than a silent failure.)
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from crosscal.models.export import PACKED, quantization_config


class Naming:
    """Maps checkpoint tensor names to tensor names of `model`, a skeleton."""

    def __init__(self, model: PreTrainedModel, *, packed: bool = False) -> None:
        """`packed`: use the rules for quantized checkpoints, whose linears hold packed parts instead of a weight."""
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
        """Return (name in the model, pattern of the conversion applied or None) for a checkpoint's tensor."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.expected)
        if name not in self.expected and key in self.expected:
            return key, None  # a rule for an older spelling matched a name that is already correct
        return name, pattern
