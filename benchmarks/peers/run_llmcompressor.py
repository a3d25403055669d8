"""llm-compressor's side of a comparison; run by the Python of its own environment: `run_llmcompressor.py JOB`.

A job has the model's folder, the file of windows, `method`, `group_size` and the output folder. The settings are the
library's defaults; its internal stages are timed by wrapping its own functions.
"""

from __future__ import annotations

import importlib
from typing import Any

from datasets import Dataset
from job import Clock, answer, read_job, windows
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from transformers import AutoModelForCausalLM

TIMED = {
    "llmcompressor.modifiers.pruning.sparsegpt.base": {"accumulate_hessian": "moments", "sparsify_weight": "solve"},
    "llmcompressor.modifiers.gptq.base": {"accumulate_hessian": "moments", "quantize_weight": "solve"},
    "llmcompressor.modifiers.pruning.wanda.base": {"accumulate_row_scalars": "moments", "sparsify_weight": "solve"},
}


def modifier(method: str, group_size: int) -> Any:
    everything: dict[str, Any] = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if method == "sparsegpt-2:4":
        return SparseGPTModifier(sparsity=0.5, mask_structure="2:4", **everything)
    if method == "sparsegpt":
        return SparseGPTModifier(sparsity=0.5, **everything)
    if method == "wanda":
        return WandaPruningModifier(sparsity=0.5, **everything)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["re:.*lm_head"])


def main() -> None:
    job, clock = read_job(), Clock()
    logger.remove()
    for name, functions in TIMED.items():
        module = importlib.import_module(name)
        for function, stage in functions.items():
            setattr(module, function, clock.timed(stage, getattr(module, function)))
    with clock.stage("all"):
        with clock.stage("load"):
            model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
        tokens_SL = windows(job, "calibration")
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens_SL.tolist()]
        with clock.stage("oneshot"):
            oneshot(
                model=model,
                dataset=Dataset.from_list(rows),
                recipe=[modifier(job["method"], job["group_size"])],
                max_seq_length=tokens_SL.shape[1],
                num_calibration_samples=len(rows),
                shuffle_calibration_samples=False,
                batch_size=job["batch_size"],
                pipeline="sequential",
            )
        with clock.stage("save"):
            model.save_pretrained(job["out"])
    answer(clock)


if __name__ == "__main__":
    main()
