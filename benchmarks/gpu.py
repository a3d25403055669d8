"""Claim: on one GPU an 8B model is calibrated in half a minute, and one more variant takes seconds.

    python benchmarks/gpu.py [--blocks 32] [--windows 128] [--repeats 3]
    python benchmarks/gpu.py --tiny --device cpu        the same code on a small model; nothing is written

A checkpoint of Llama-3.1-8B's shape with random bfloat16 weights is written and loaded block by block, like any model:
`walk` over random tokens, then the solver on the Hessians, for one sparsity and for eight solved together. With fewer
`--blocks` than 32 the seconds are scaled to 32, as the rows state; solver times are the first block's times 32. Weights
and moments of the block to solve start in host memory. The operations counted are the matrix products of the blocks (2
per weight and token), attention scores, and half of each Hessian; their rate is compared with that of a plain bfloat16
product measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import cpu, median_record, record, write

from crosscal.compressors import LayerProblem, SparseGPT, solve_many
from crosscal.models import BlockMoments, ModelSource, walk
from crosscal.statistics import factor

SPARSITIES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
LLAMA_BLOCKS = 32
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    length: int
    batch_tokens: int
    vocabulary: int = 4096
    """Embeddings are not measured; Llama-3.1-8B's would add 2 GiB of file."""

    @property
    def weights(self) -> int:
        """Number of weights of one block's linears."""
        kv_width = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden**2 + 2 * self.hidden * kv_width + 3 * self.hidden * self.intermediate

    @property
    def operations(self) -> int:
        """FLOP per token and block: linears, attention (causal: half), half of every Hessian."""
        hessians = 3 * self.hidden * (self.hidden + 1) + self.intermediate * (self.intermediate + 1)
        return 2 * self.weights + 2 * self.length * self.hidden + hessians


LLAMA_8B = Shape(4096, 14336, 32, 8, 2048, 16384)
TINY = Shape(128, 384, 4, 2, 64, 256)


def make_model(folder: Path, shape: Shape, blocks: int) -> None:
    """Write random bfloat16 weights, one file per block, never holding all of them in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    expected.pop("lm_head.weight")  # tied
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for block in [*(f"model.layers.{index}." for index in range(blocks)), ""]:
        names = [name for name in expected if name not in weight_map and name.startswith(block)]
        file = f"part-{block.strip('.') or 'outside'}.safetensors"
        save_file({name: _random(expected[name], generator) for name in names}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return (torch.randn(like.shape, generator=generator) * like.shape[1] ** -0.5).to(torch.bfloat16)


@dataclass(frozen=True)
class Bench:
    shape: Shape
    blocks: int
    windows: int
    repeats: int
    device: str

    @property
    def scale(self) -> float:
        """Factor from the blocks that were run to those of the model."""
        return LLAMA_BLOCKS / self.blocks

    @property
    def tokens(self) -> int:
        return self.windows * self.shape.length

    def seconds(self, action: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def peak_gib(self) -> float:
        """Return peak GPU memory since the last call."""
        if self.device == "cpu":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def product_rate(bench: Bench) -> float:
    """Return FLOP/s of a plain bfloat16 product of the model's widest shapes, the best of five."""
    tokens, hidden, wide = bench.shape.batch_tokens, bench.shape.hidden, bench.shape.intermediate
    left = torch.randn(tokens, hidden, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(hidden, wide, device=bench.device, dtype=torch.bfloat16)
    bench.seconds(lambda: left @ right)
    return max(2 * tokens * hidden * wide * 10 / bench.seconds(lambda: _ten(left, right)) for _ in range(5))


def _ten(left: torch.Tensor, right: torch.Tensor) -> None:
    for _ in range(10):
        left @ right


def calibrate(bench: Bench, source: ModelSource, tokens_SL: torch.Tensor) -> BlockMoments:
    """Run the calibration pass; keep the first block's moments for the solver and drop the others'."""
    first: list[BlockMoments] = []

    def keep(found: BlockMoments) -> None:
        if found.block == 0:
            parameters = {name: tensor.detach().cpu() for name, tensor in found.parameters.items()}
            first.append(dataclasses.replace(found, parameters=parameters))

    walk(
        source,
        {"random": tokens_SL},
        on_block=keep,
        device=bench.device,
        dtype=torch.bfloat16,
        batch_tokens=bench.shape.batch_tokens,
    )
    return first[0]


def solve(bench: Bench, block: BlockMoments, sparsities: tuple[float, ...]) -> None:
    """Solve one block at these sparsities, from moments in host memory to weights on the device."""
    for site in block.sites:
        hessian_II = block.moments["random"][site.name].hessian_II(site.name).to(bench.device)
        shared = factor(hessian_II, name=site.name)
        problems = [
            LayerProblem(
                matrix.name,
                matrix.weight_OI(block.parameters).to(bench.device, torch.float32),
                hessian_II,
                shared_factor=shared,
                stored_dtype=torch.bfloat16,
            )
            for matrix in site.matrices
        ]
        solve_many(problems, [SparseGPT(sparsity) for sparsity in sparsities])


def measure(bench: Bench, folder: Path) -> Iterator[dict[str, Any]]:
    source = ModelSource.open(folder)
    generator = torch.Generator().manual_seed(0)
    tokens_SL = torch.randint(bench.shape.vocabulary, (bench.windows, bench.shape.length), generator=generator)
    plain = product_rate(bench)
    case = f"Llama of hidden {bench.shape.hidden}, {bench.windows} x {bench.shape.length} tokens"
    scaled = f", scaled from {bench.blocks} to {LLAMA_BLOCKS} blocks" if bench.scale != 1 else ""
    yield record(case, "plain bfloat16 product", plain / 1e12, "TFLOP/s")
    bench.peak_gib()
    first = calibrate(bench, source, tokens_SL[:2])  # warm-up: kernels are selected
    times = [bench.seconds(lambda: calibrate(bench, source, tokens_SL)) for _ in range(bench.repeats)]
    rates = [bench.tokens * bench.blocks * bench.shape.operations / spent for spent in times]
    yield median_record(case, f"calibration{scaled}", [spent * bench.scale for spent in times], "s")
    yield median_record(case, "calibration, rate", [rate / 1e12 for rate in rates], "TFLOP/s")
    yield median_record(case, "calibration over plain product", [rate / plain for rate in rates], "ratio")
    yield record(case, "peak GPU memory, calibration", bench.peak_gib(), "GiB")
    for count in (1, len(SPARSITIES)):
        action = partial(solve, bench, first, SPARSITIES[:count])
        action()
        times = [bench.seconds(action) for _ in range(bench.repeats)]
        seconds = [spent * LLAMA_BLOCKS for spent in times]
        label = "one sparsity" if count == 1 else f"{count} sparsities stacked"
        yield median_record(case, f"solve, {label}, one block times {LLAMA_BLOCKS}", seconds, "s")
        yield record(case, f"peak GPU memory, {label}", bench.peak_gib(), "GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=LLAMA_BLOCKS)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.exit(1, "gpu.py: no NVIDIA GPU is visible to torch; `--tiny --device cpu` tries the code on a CPU.\n")
    shape, blocks, windows = (TINY, 2, 8) if options.tiny else (LLAMA_8B, options.blocks, options.windows)
    bench = Bench(shape, blocks, windows, options.repeats, options.device)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), shape, blocks)
        rows = list(measure(bench, Path(folder)))
    for row in rows:
        print(f"{row['case']} | {row['figure']} | {row['value']:.4g} {row['unit']}")
    if not options.tiny:
        name = cpu() if options.device == "cpu" else torch.cuda.get_device_name(options.device)
        write("gpu", rows, device=f"{name}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
