"""A tokenizer trained in memory on a few sentences, and a random Llama for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "The river runs past the old mill and on to the sea.",
    "A doctor gave the patient two tablets of aspirin in the morning.",
    "This section shall not apply to any person who holds a licence.",
    "When it rains we stay at home, and when the sun shines we walk.",
    "For every question there is an answer, but not every answer is true.",
)


def tiny_tokenizer(*, begin: bool = True, end: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens; `<s>` = 0, prepended by default, `</s>` = 1, `<pad>` = 2."""
    tokenizer = Tokenizer.from_str(_trained())
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>"} if begin else {}
    special |= {"eos_token": "</s>"} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64, **special)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer.to_str()


def tiny_llama(folder: Path | None = None, *, seed: int = 0, blocks: int = 2) -> LlamaForCausalLM:
    """Random float32 blocks over the tiny vocabulary; with `folder`, saved there together with the tokenizer."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,  # wide enough for distributions that are far from uniform
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return model
