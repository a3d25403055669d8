"""Open a dense model or a compressed variant for measuring it one block at a time.

Supported: dense weights; 8- and 4-bit floats with scales (`encoded.py`); linears packed as in `export.py`, unpacked
when their block is read; low-rank parts, which `by_blocks.py` adds to the outputs of the linears. Any other
quantization is rejected: only code that loads the whole model could read its blocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from crosscal.errors import ModelError
from crosscal.models.adapter import adapter_files, check_in_blocks
from crosscal.models.blocks import MODEL_ERRORS
from crosscal.models.encoded import encoding_of, packed_bits
from crosscal.models.source import ModelSource
from crosscal.models.tensor_files import INDEX, SINGLE


def open_variant(folder: Path) -> ModelSource:
    """Open a model folder. Raises `ModelError` if it is not a complete model, if tensors of its config are missing, or
    if it cannot be read block by block."""
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        raise ModelError("this is not a complete model", where=str(folder), got=f"no {INDEX}", do="Finish writing it.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, *MODEL_ERRORS) as error:
        raise ModelError("the model's config cannot be read", where=str(folder), got=str(error)) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization and not encoding_of(quantization) and packed_bits(quantization) is None:
        raise ModelError(
            "a model that does not fit in memory is measured block by block, and one that is quantized in this way "
            "can only be loaded whole",
            where=str(folder),
            got=str(quantization.get("quant_method")),
            do="Measure it where it fits in memory.",
        )
    if packed_bits(quantization) is not None and not isinstance(config.dtype, torch.dtype):
        config.dtype = torch.float32  # like `load_variant`, which does not round the weights in this case
    source = ModelSource(folder, config)
    source.weights.check_names()
    if adapter_files(folder):
        check_in_blocks(folder, source.block_name(0).rpartition(".")[0])
    return source
