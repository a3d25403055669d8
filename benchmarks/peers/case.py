"""The cases of a comparison: a model folder with float32 weights and a file of windows, the same for every tool.

Shapes: S windows, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crosscal.evaluation.likelihood import windows_of
from crosscal.files import JsonRecord, json_records
from crosscal.models import load_variant

CORPORA = ("general", "biomedical")


@dataclass(frozen=True)
class Case:
    name: str
    model: Path
    windows: Path
    """File with `calibration` and `held_out` tokens_SL; the halves of each are of two corpora."""
    group_size: int
    """GPTQ group size; divides the widths of the model."""


def random_case(folder: Path, *, tiny: bool = False) -> Case:
    """A Llama with seeded random weights and random tokens: compares implementations, not quality."""
    hidden, intermediate, blocks, windows, length = (128, 256, 2, 8, 64) if tiny else (512, 1408, 6, 64, 512)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = WordLevel({str(token): token for token in range(config.vocab_size)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0")
    tokenizer.save_pretrained(folder / "model")  # llm-compressor requires one, but never calls it
    calibration_SL = torch.randint(config.vocab_size, (windows, length))
    held_out_SL = torch.randint(config.vocab_size, (windows // 4, length))
    return _case("random Llama", folder, calibration_SL, held_out_SL, 128)


def testbed_case(folder: Path, testbed: Path) -> Case:
    """The test bed's model, widened to float32, and real text: half general, half biomedical."""
    source = testbed / "models" / "llama-mix-8m"
    load_variant(source, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.save_pretrained(folder / "model")

    def drawn(split: str, windows: int) -> Tensor:
        return torch.cat([windows_of(texts(testbed, name, split), tokenizer, 256, windows) for name in CORPORA])

    return _case("testbed llama-mix-8m", folder, drawn("train", 64), drawn("validation", 16), 64)


def texts(testbed: Path, corpus: str, split: str, documents: int = 2000) -> Iterator[str]:
    """Yield the first documents of a split."""
    for record in islice(json_records(testbed / "corpora" / corpus / f"{split}.jsonl.zst"), documents):
        assert isinstance(record, JsonRecord), record
        yield record.value["text"]


def _case(name: str, folder: Path, calibration_SL: Tensor, held_out_SL: Tensor, group_size: int) -> Case:
    file = folder / "windows.safetensors"
    save_file({"calibration": calibration_SL, "held_out": held_out_SL}, file)
    return Case(name, folder / "model", file, group_size)
