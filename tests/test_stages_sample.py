"""Sampling: a landed shard costs only its own tokens, and stored self-generated text is not generated again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscal.calibration import TemperatureSchedule
from crosscal.calibration.sets import windows_by_key
from crosscal.corpora import Corpus, ingest, load_corpus
from crosscal.errors import TooLittleText
from crosscal.models import ModelSource
from crosscal.progress import silent
from crosscal.stages import sample as stage
from crosscal.stages.describe import SHOWN_CHARACTERS, readable_samples, sample_quality
from crosscal.stages.sample import Draw, Sample, sample_documents, sample_random, sample_self
from crosscal.store import Store
from tests.helpers.tiny_text import SENTENCES, tiny_llama

DRAW = Draw(windows=8, length=32, seed=0, held_out_windows=2)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    tiny_llama(tmp_path / "model")
    return ModelSource.open(tmp_path / "model")


def land(store: Store, folder: Path, name: str, count: int, *, seed: int, sentences: int = 6) -> Corpus:
    """Ingest `count` documents that differ from those of every other seed."""
    chance, file = random.Random(seed), folder / f"{name}-{seed}.jsonl"
    texts = [f"{seed} {index} " + " ".join(chance.choices(SENTENCES, k=sentences)) for index in range(count)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ingest(store, name, [str(file)])
    return load_corpus(store, name)


def test_a_landed_shard_is_sampled_by_its_share_and_changes_no_earlier_set(
    store: Store, source: ModelSource, tmp_path: Path
) -> None:
    first = sample_documents(store, land(store, tmp_path, "legal", 60, seed=1), source, DRAW)
    corpus = land(store, tmp_path, "legal", 20, seed=2)
    second = sample_documents(store, corpus, source, DRAW)
    characters = [shard.characters["train"] for shard in corpus.shards]
    shares = [count / sum(characters) for count in characters]
    masses = [part.mass for part in second.calibration.parts]
    assert [mass / sum(masses) for mass in masses] == pytest.approx(shares, rel=0.05)
    assert second.calibration.parts[0] == first.calibration.parts[0]
    assert second.held_out.parts[0] == first.held_out.parts[0]
    assert first.calibration.tokens == DRAW.windows * DRAW.length
    assert second.calibration.parts[1].tokens == round(DRAW.windows * shares[1]) * DRAW.length
    assert Sample.from_json(json.loads(json.dumps(second.as_json()))) == second
    for part in (*second.calibration.parts, *second.held_out.parts):
        assert windows_by_key(store, part.key).numel() == part.tokens


def test_too_little_text_is_told_of_the_corpus(store: Store, source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(TooLittleText, match="tiny: the train split does not fill one window"):
        sample_documents(store, land(store, tmp_path, "tiny", 1, seed=3, sentences=1), source, DRAW)


def test_held_out_windows_come_from_other_documents(store: Store, source: ModelSource, tmp_path: Path) -> None:
    whole = sample_documents(store, land(store, tmp_path, "legal", 60, seed=1), source, DRAW)
    drawn, held_out = (
        {tuple(window) for window in windows_by_key(store, sums.apart[0].key).tolist()}
        for sums in (whole.calibration, whole.held_out)
    )
    assert len(held_out) == DRAW.held_out_windows
    assert not drawn & held_out


def written(store: Store, source: ModelSource, dtype: torch.dtype) -> Sample:
    settings: dict[str, Any] = {"temperature": TemperatureSchedule(), "first_tokens": [], "device": "cpu"}
    return sample_self(store, "self", source, DRAW, **settings, dtype=dtype, report=silent)


def test_however_little_memory_is_free_the_same_text_is_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "model")
    source, other = ModelSource.open(tmp_path / "model"), Store(tmp_path / "other")
    plenty = written(store, source, torch.float32)
    monkeypatch.setattr(stage, "usable_bytes", lambda device: 0)
    scarce = written(other, source, torch.float32)
    assert scarce == plenty
    key = plenty.calibration.apart[0].key
    assert torch.equal(windows_by_key(store, key), windows_by_key(other, key))


def test_a_model_writes_in_the_dtype_that_is_asked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "half").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    source, dtypes, load = ModelSource.open(tmp_path / "half"), [], stage.load_variant

    def loaded(*path: Path, **more: Any) -> Any:
        model = load(*path, **more)
        dtypes.append(model.dtype)
        return model

    monkeypatch.setattr(stage, "load_variant", loaded)
    samples = [written(store, source, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert samples[0].calibration.key != samples[1].calibration.key


def test_text_that_was_written_is_found_again_without_loading_the_model(
    store: Store, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = stage.load_variant
    monkeypatch.setattr(stage, "load_variant", lambda path, **more: loads.append(path) or load(path, **more))

    first = written(store, source, torch.float32)
    assert len(loads) == 1
    assert written(store, source, torch.float32) == first
    assert len(loads) == 1
    assert first.calibration.tokens == DRAW.windows * DRAW.length
    assert first.calibration.key != first.held_out.key


def test_samples_are_described_in_text_and_numbers(store: Store, source: ModelSource, tmp_path: Path) -> None:
    corpus = land(store, tmp_path, "legal", 60, seed=1)
    legal = sample_documents(store, corpus, source, DRAW)
    other_seed = sample_documents(store, corpus, source, Draw(8, 32, 1, 2))
    noise = sample_random(store, "noise", source, Draw(8, 128, 0, 2))
    everything = [legal, noise, other_seed]
    kinds = {"legal": "documents", "noise": "random"}
    shown = readable_samples(store, source, everything, kinds, per_corpus=3)
    assert [entry["corpus"] for entry in shown] == ["legal"] * 3 + ["noise"] * 3
    assert all(entry["source"] == kinds[entry["corpus"]] for entry in shown)
    assert shown[0]["text"] == source.tokenizer().decode(windows_by_key(store, legal.calibration.key)[0])
    assert all(len(entry["text"]) <= SHOWN_CHARACTERS + 2 for entry in shown)
    quality = json.loads(json.dumps(sample_quality(store, source, everything), allow_nan=False))
    assert list(quality) == ["legal", "noise"]
    assert quality["noise"]["ngram_diversity"] > quality["legal"]["ngram_diversity"]
    assert quality["noise"]["zipf_coefficient"] < quality["legal"]["zipf_coefficient"]
