"""Measure the demo's model as it stands here: perplexity on the test documents, share of the questions it gets right.

    python data/demo/measure_model.py

Suffixes: T tokens of a stream, N windows in it, D windows of a batch, S positions of a window, V vocabulary.
"""

import json
import math

import torch
from make_corpora import DOMAINS, HERE, read
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

WINDOW_TOKENS = 128


def texts(domain: str, split: str) -> list[str]:
    lines = read(HERE / "corpora" / domain / f"{split}.jsonl.zst").splitlines()
    return [json.loads(line)["text"] for line in lines]


def questions(domain: str) -> list[dict]:
    return [json.loads(line) for line in read(HERE / "tasks" / f"{domain}_facts.jsonl").splitlines()]


def stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents in a row, each between <s> and </s>."""
    encoded = tokenizer(documents)["input_ids"]
    return torch.tensor([token for tokens in encoded for token in [*tokens, tokenizer.eos_token_id]])


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream_T: Tensor, window_tokens: int = WINDOW_TOKENS) -> float:
    """exp of the mean loss per predicted token, over consecutive windows; the last, incomplete one is left out."""
    windows_NS = stream_T.unfold(0, window_tokens, window_tokens)
    losses = [model(batch_DS, labels=batch_DS).loss * len(batch_DS) for batch_DS in windows_NS.split(32)]
    return math.exp(torch.stack(losses).sum() / len(windows_NS))


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """Share of questions whose right ending has the highest log-probability, summed over its tokens."""
    right = 0
    for row in rows:
        asked_tokens = len(tokenizer(row["question"])["input_ids"])
        scores = []
        for choice in row["choices"]:
            tokens_1S = tokenizer(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
            log_probability_SV = model(tokens_1S).logits[0, :-1].log_softmax(-1)
            of_next_S = log_probability_SV.gather(1, tokens_1S[0, 1:, None])[:, 0]
            scores.append(of_next_S[asked_tokens - 1 :].sum().item())
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print both for each domain."""
    for domain in DOMAINS:
        value = perplexity(model, stream(tokenizer, texts(domain.name, "test")))
        right = accuracy(model, tokenizer, questions(domain.name))
        print(f"{domain.name:12} test perplexity {value:.2f}  facts right {right:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(AutoModelForCausalLM.from_pretrained(HERE / "model").eval(), AutoTokenizer.from_pretrained(HERE / "model"))
