"""Train the demo's tokenizer and model from scratch on the demo's training documents: minutes on one CPU core.

    python data/demo/train_model.py

Suffixes: T tokens of a stream, N windows in it, D windows of a batch, S positions of a window.
"""

import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from grammar.documents import documents
from make_corpora import DOMAINS, HERE
from measure_model import measure, stream, texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MORE_DOCUMENTS = {"general": 10000, "biomedical": 7000, "legal": 7000}


@dataclass(frozen=True)
class Recipe:
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    blocks: int = 3
    positions: int = 256
    window_tokens: int = 128
    windows_per_step: int = 16
    steps: int = 2200
    warmup_steps: int = 60
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0


def training_texts() -> list[str]:
    """The training splits and many more documents of the same grammar, so that facts are learned, not documents."""
    written = [text for domain in DOMAINS for text in texts(domain.name, "train")]
    for domain in DOMAINS:
        more = documents(domain, Random(f"{domain.name} more documents"))
        written += islice(more, MORE_DOCUMENTS[domain.name])
    kept_back = {text for domain in DOMAINS for split in ("validation", "test") for text in texts(domain.name, split)}
    return [text for text in written if text not in kept_back]


def train_tokenizer(training: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; encoding puts <s> in front.

    The prefix space makes a name at the beginning of a text the same token as the name inside it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_prefix_space=True
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=recipe.positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, stream_T: Tensor, recipe: Recipe) -> None:
    """AdamW on windows drawn anywhere in the stream, learning rate up in a line and down in a cosine."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / recipe.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)),
    )
    windows_NS = stream_T.unfold(0, recipe.window_tokens, 1)
    started = time.perf_counter()
    for step in range(recipe.steps):
        drawn_D = torch.randint(len(windows_NS), (recipe.windows_per_step,), generator=generator)
        tokens_DS = windows_NS[drawn_D]
        loss = model(tokens_DS, labels=tokens_DS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)


def main(recipe: Recipe = Recipe(), folder: Path = HERE / "model") -> None:
    torch.set_num_threads(1)
    training = training_texts()
    tokenizer = train_tokenizer(training, recipe.vocabulary)
    model = new_model(tokenizer, recipe)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model.train(), stream(tokenizer, training), recipe)
    model.eval()
    measure(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
