"""Quantize a model folder with llm-compressor, without data; run by its own environment's Python with a JSON job."""

from __future__ import annotations

import json
import sys

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    job = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=True, strategy="group", group_size=job["group_size"]
    )
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    ignore = ["re:.*lm_head", r"re:.*\.gate$", r"re:.*\.router$"]
    oneshot(
        model=model,
        recipe=[QuantizationModifier(config_groups={"group_0": group}, ignore=ignore)],
        output_dir=job["out"],
        pipeline="datafree",
    )
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main()
