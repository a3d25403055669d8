"""Sampling of whole texts from a causal language model, a batch of independent sequences at a time."""

from __future__ import annotations

# Shapes: B sequences generated together, P tokens of a prompt, T of one forward pass, N of a whole text, V vocabulary.
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from crosscal.errors import CalibrationError, UsageError
from crosscal.progress import Added

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TemperatureSchedule:
    """t_i = t_init + (i / steps) (t_final - t_init) for i <= steps, else t_final; i counts sampled tokens from 0.

    A temperature of 0 means greedy decoding. The main results of arXiv:2410.17170 use plain sampling: 1.0 throughout.
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
class GeneratedText:
    tokens: list[int]
    nll: float
    """Mean negative log-likelihood of all tokens but the first, at temperature 1; 0 if not `judged`."""


@dataclass(frozen=True)
class SequenceWriter:
    """Samples texts from `model`; its fields are the settings shared by all texts of one set."""

    model: PreTrainedModel
    start: int
    """Start token, the whole prompt of the sequences that `write` samples."""

    end: int
    length: int
    """Maximum number of tokens in a sequence, prompt included."""

    temperature: TemperatureSchedule
    first_ids: tuple[int, ...] | None
    """Tokens that may be sampled first; None for all."""

    device: str
    at_once: int | None = None
    """Maximum number of sequences generated together; None: all that are requested."""

    def write(self, numbers: range, seed: int, *, sampled: Added | None = None) -> list[list[int]]:
        """Return a sequence for every number, each from the start token to end-of-text or `length` tokens."""
        start_B1 = torch.full((len(numbers), 1), self.start)
        return [written.tokens for written in self.continued(start_B1, numbers, seed, sampled=sampled)]

    def continued(
        self,
        prompt_BP: torch.Tensor,
        numbers: range,
        seed: int,
        *,
        judged: bool = False,
        sampled: Added | None = None,
    ) -> list[GeneratedText]:
        """Continue each row of the prompt (on the CPU) to end-of-text or `length` tokens, prompt included.

        A continuation depends on its prompt, the seed and its number, not on other rows: its i-th token is where the
        i-th number of its own random stream falls in the cumulative distribution. `judged`: also compute
        `GeneratedText.nll`. `sampled` is called with the number of tokens after every step.
        """
        streams = [np.random.Generator(np.random.PCG64([seed, number])) for number in numbers]
        uniform_BN = torch.tensor(np.stack([stream.random(self.length) for stream in streams]))
        parts = zip(*(every.split(self.at_once or len(numbers)) for every in (prompt_BP, uniform_BN)), strict=True)
        return [written for prompt, uniform in parts for written in self._together(prompt, uniform, judged, sampled)]

    @torch.inference_mode()
    def _together(
        self, prompt_BP: torch.Tensor, uniform_BN: torch.Tensor, judged: bool, sampled: Added | None
    ) -> list[GeneratedText]:
        """Sample all rows together. They begin at position 0 and do not attend to each other, so no padding or mask is
        needed; finished rows are removed from the cache."""
        rows: list[list[int]] = prompt_BP.tolist()
        nll = np.zeros(len(rows))
        writing = list(range(len(rows)))
        tokens_BT, cache = prompt_BP.to(self.device), None
        for step in range(self.length - prompt_BP.shape[1]):
            output = self.model(input_ids=tokens_BT, past_key_values=cache, use_cache=True)
            if (cache := output.get("past_key_values")) is None:
                kind = type(output).__name__
                raise CalibrationError(
                    "the model returns no cache of keys and values, which generation needs",
                    got=kind,
                    do="Use real documents.",
                )
            token_B = self._sample(output.logits[:, -1].float(), step, uniform_BN[writing, step])
            if judged:
                nll[writing] += _surprise(output, tokens_BT, token_B)
            tokens = token_B.tolist()  # waits for the device
            for row, token in zip(writing, tokens, strict=True):
                rows[row].append(token)
            if sampled:
                sampled(len(tokens))
            staying = [place for place, token in enumerate(tokens) if token != self.end]
            if not staying:
                break
            if len(staying) < len(writing):
                places = torch.tensor(staying, device=token_B.device)
                cache.reorder_cache(places)
                writing, token_B = [writing[place] for place in staying], token_B[places]
            tokens_BT = token_B[:, None]
        return [GeneratedText(row, each / (len(row) - 1)) for row, each in zip(rows, nll.tolist(), strict=True)]

    def _sample(self, logits_BV: torch.Tensor, step: int, uniform_B: torch.Tensor) -> torch.Tensor:
        if step == 0 and self.first_ids is not None:
            allowed_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
            allowed_V[list(self.first_ids)] = True
            logits_BV = logits_BV.masked_fill(~allowed_V, -torch.inf)
        temperature = self.temperature.at(step)
        if temperature == 0:
            return logits_BV.argmax(dim=-1)
        cumulated_BV = torch.softmax(logits_BV / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
        sought_B1 = uniform_B[:, None].to(cumulated_BV.device) * cumulated_BV[:, -1:]
        return torch.searchsorted(cumulated_BV, sought_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def sequence_bytes(length: int, prompt: int, *, blocks: int, hidden: int, vocabulary: int, itemsize: int) -> int:
    """Return the maximum memory per generated sequence, in bytes: keys and values of every block, as wide as hidden
    states (without grouped-query attention), and logits of the prompt, in the model's dtype, in float32, and twice in
    float64."""
    return 2 * blocks * hidden * length * itemsize + prompt * vocabulary * (itemsize + 4 + 2 * 8)


def _surprise(output: Any, tokens_BT: torch.Tensor, token_B: torch.Tensor) -> np.ndarray:
    """Return per row the sum of -log p over the input tokens but the first, and the sampled token, float64 [B]."""
    next_BT = torch.cat([tokens_BT[:, 1:], token_B[:, None]], dim=1)
    nll_BT = F.cross_entropy(output.logits.float().transpose(1, 2), next_BT, reduction="none")
    return nll_BT.double().sum(dim=1).cpu().numpy()
