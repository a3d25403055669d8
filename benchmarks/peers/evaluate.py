"""Evaluate the compressed models of one case, whichever tool made them: `evaluate.py JOB`.

The relative error of a linear is tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) with H = Σ x xᵀ of the dense model's inputs, in float64,
over the calibration windows and over held-out ones; the figure is the mean over linears. Perplexity: held-out windows.
Shapes: S windows, L tokens, T tokens of a window, O outputs, I inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from job import read_job, windows
from torch import Tensor, nn

from crosscal.evaluation.likelihood import perplexity
from crosscal.models import load_variant


def hessians(model: Any, tokens_SL: Tensor) -> dict[str, Tensor]:
    """Linear -> Σ x xᵀ in float64; linears that read the same tensor share the sum."""
    sums: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, str]] = {}

    def note(name: str, input_TI: Tensor) -> None:
        leader = next((first for held, first in seen.values() if held is input_TI), name)
        seen[name] = (input_TI, leader)
        if leader == name:
            rows_TI = input_TI.detach().reshape(-1, input_TI.shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows_TI.mT @ rows_TI

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, args[0]))
        for name, module in linears(model).items()
    ]
    with torch.inference_mode():
        for window_L in tokens_SL:
            model(input_ids=window_L[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: sums[leader] for name, (_, leader) in seen.items()}


def linears(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}


def relative_error(dense: Any, compressed: Any, hessian_by_linear: dict[str, Tensor]) -> float:
    found = []
    for name, linear in linears(dense).items():
        weight_OI = linear.weight.detach().double()
        difference_OI = compressed.get_submodule(name).weight.detach().double() - weight_OI
        hessian_II = hessian_by_linear[name]
        found.append(energy(difference_OI, hessian_II) / energy(weight_OI, hessian_II))
    return sum(found) / len(found)


def energy(weight_OI: Tensor, hessian_II: Tensor) -> float:
    return float(((weight_OI @ hessian_II) * weight_OI).sum())


def sparsity(model: Any) -> float:
    weights = [linear.weight for linear in linears(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def main() -> None:
    job = read_job()
    dense = load_variant(Path(job["model"]), dtype=torch.float32)
    held_out_SL = windows(job, "held_out")
    on_calibration, on_held_out = hessians(dense, windows(job, "calibration")), hessians(dense, held_out_SL)
    judged: dict[str, dict[str, float | None]] = {}
    for name, folder in {"dense": job["model"], **job["models"]}.items():
        model = load_variant(Path(folder), dtype=torch.float32)
        found = perplexity(model, held_out_SL, name=name, split="held out", device="cpu")
        judged[name] = {
            "calibration error": relative_error(dense, model, on_calibration),
            "held-out error": relative_error(dense, model, on_held_out),
            "perplexity": found.value,
            "perplexity stderr": found.stderr,
            "sparsity": sparsity(model),
        }
    print(json.dumps(judged))


if __name__ == "__main__":
    main()
