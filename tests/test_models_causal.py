"""Only causal decoders are calibrated: decided by what the blocks compute, and reported before any work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from crosscal.errors import UnsupportedModel
from crosscal.models import ModelSource, walk
from crosscal.models.walk import survey
from tests.helpers.tiny_models import COMMON, FAMILIES, save_model, windows

ENCODERS = ["BertConfig", "RobertaConfig", "ElectraConfig", "RoFormerConfig", "BertGenerationConfig"]


def save_bert(kind: str, folder: Path, *, is_decoder: bool) -> ModelSource:
    config = getattr(transformers, kind)(
        **{key: value for key, value in COMMON.items() if key != "num_key_value_heads"}, is_decoder=is_decoder
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
    model.save_pretrained(folder)
    return ModelSource.open(folder)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused_and_the_same_blocks_as_a_decoder_are_not(kind: str, tmp_path: Path) -> None:
    decoder = save_bert(kind, tmp_path / "decoder", is_decoder=True)
    assert walk(decoder, {"all": windows(2)}, on_block=lambda found: None).blocks == decoder.blocks
    assert len(survey(decoder)) == decoder.blocks
    encoder = save_bert(kind, tmp_path / "encoder", is_decoder=False)
    for look in (lambda: walk(encoder, {"all": windows(2)}, on_block=lambda found: None), lambda: survey(encoder)):
        with pytest.raises(UnsupportedModel, match="not a causal model"):
            look()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_survey_finds_what_a_walk_finds(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No decoder is taken for an encoder, in either dtype."""
    source = ModelSource.open(save_model(family, tmp_path / "model"))
    found = []
    walk(source, {"all": windows(2)}, on_block=lambda seen: found.append((seen.sites, seen.left_dense)), dtype=dtype)
    surveyed = [(matrices.sites, matrices.left_dense) for matrices in survey(source)]
    assert [Counter(sites) for sites, _ in surveyed] == [Counter(sites) for sites, _ in found]
    assert [left for _, left in surveyed] == [left for _, left in found]
