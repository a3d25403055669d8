"""A random natural language inference (NLI) model over the tiny vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.helpers.tiny_text import tiny_tokenizer


def tiny_judge(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    labels = {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}
    config = BertConfig(vocab_size=400, pad_token_id=2, initializer_range=0.5, id2label=labels, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer(begin=False).save_pretrained(folder)
    return folder
