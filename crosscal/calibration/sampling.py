"""Sampling whole texts from a causal language model, a batch of independent ones at a time."""

from __future__ import annotations

# Shapes: B sequences generated together, P tokens of a prompt, T read at once, V vocabulary.
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from crosscal.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TemperatureSchedule:
    """t_i = t_init + (i / steps) (t_final - t_init) for i <= steps, else t_final; i counts sampled tokens from 0.

    A temperature of 0 means the likeliest token. The paper's main results are plain sampling: 1.0 throughout.
    """

    t_init: float = 1.0
    t_final: float = 1.0
    steps: int = 10

    def __post_init__(self) -> None:
        if self.t_init < 0 or self.t_final < 0 or self.steps < 1:
            raise UsageError("temperatures are at least 0 and steps at least 1", where="temperature", got=str(self))

    def at(self, step: int) -> float:
        if step > self.steps:
            return self.t_final
        return self.t_init + step / self.steps * (self.t_final - self.t_init)


@dataclass(frozen=True)
class Written:
    tokens: list[int]
    nll: float
    """Mean negative log-likelihood of its tokens but the first, at temperature 1, where it was judged; else 0."""


@dataclass(frozen=True)
class SequenceWriter:
    """What all texts of one set have in common."""

    model: PreTrainedModel
    start: int
    """Token that every sequence is conditioned on, and nothing else."""

    end: int
    length: int
    """Most tokens in a sequence, the start token among them."""

    temperature: TemperatureSchedule
    first_ids: tuple[int, ...] | None
    """Tokens that may be sampled first; None for all."""

    device: str

    def write(self, count: int, seed: int) -> list[list[int]]:
        """`count` independent sequences, each from the start token to end-of-text or `length` tokens."""
        start_B1 = torch.full((count, 1), self.start)
        return [written.tokens for written in self.continued(start_B1, seed)]

    @torch.inference_mode()
    def continued(self, prompt_BP: torch.Tensor, seed: int, *, judged: bool = False) -> list[Written]:
        """Each row of the prompt (on the CPU), continued to end-of-text or `length` tokens, the prompt's among them.

        All rows begin at position 0 and none sees another, so no padding or mask is needed: what a finished row
        goes on to produce is not taken. `judged`: say how likely the model finds each text.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        rows: list[list[int]] = prompt_BP.tolist()
        nll = [0.0] * len(rows)
        writing = set(range(len(rows)))
        tokens_BT, cache = prompt_BP.to(self.device), None
        for step in range(self.length - prompt_BP.shape[1]):
            output = self.model(input_ids=tokens_BT, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token_B = self._sample(output.logits[:, -1].float(), step, generator)
            if judged:
                nll = [
                    nll[row] + (each if row in writing else 0.0) for row, each in _surprise(output, tokens_BT, token_B)
                ]
            tokens_BT = token_B[:, None]
            for row, token in enumerate(token_B.tolist()):
                if row in writing:
                    rows[row].append(token)
                    if token == self.end:
                        writing.remove(row)
            if not writing:
                break
        return [Written(row, each / (len(row) - 1)) for row, each in zip(rows, nll, strict=True)]

    def _sample(self, logits_BV: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
        if step == 0 and self.first_ids is not None:
            allowed_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
            allowed_V[list(self.first_ids)] = True
            logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
        temperature = self.temperature.at(step)
        if temperature == 0:
            return logits_BV.argmax(dim=-1)
        probability_BV = torch.softmax(logits_BV / temperature, dim=-1)
        return torch.multinomial(probability_BV, 1, generator=generator)[:, 0]


def _surprise(output: Any, tokens_BT: torch.Tensor, token_B: torch.Tensor) -> Iterator[tuple[int, float]]:
    """(row, -log p) of what was read, but the first, and of the token that follows."""
    next_BT = torch.cat([tokens_BT[:, 1:], token_B[:, None]], dim=1)
    nll_BT = F.cross_entropy(output.logits.float().transpose(1, 2), next_BT, reduction="none")
    return enumerate(nll_BT.double().sum(dim=1).tolist())
