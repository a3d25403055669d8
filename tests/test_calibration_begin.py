"""Windows start with the model's begin token; special tokens spelled in texts are counted, or encoded as plain text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosscal.calibration import Pool, WindowRequest, draw_pool, generate_windows, random_windows
from crosscal.calibration.cutting import cut
from crosscal.calibration.sets import windows_by_key
from crosscal.calibration.tokens import begin_token, check_tokenizer
from crosscal.corpora import Shard, ingest
from crosscal.errors import CalibrationError
from crosscal.evaluation import windows_of
from crosscal.store import Store, digest_of
from tests.helpers.tiny_text import SENTENCES, tiny_llama, tiny_tokenizer

DIGEST = "0" * 64
REQUEST = WindowRequest(12, 24)
TEXTS = [f"{index} {' '.join(SENTENCES[: 1 + index % 5])}" for index in range(400)]


def tokenizer(template: str, *, begin: str | None = "<s>") -> PreTrainedTokenizerFast:
    """`template`: special tokens that encoding adds around a text `$A`; `<s>` is 0, `</s>` 1."""
    made = tiny_tokenizer(begin=False)
    made.bos_token = begin
    if template != "$A":
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1), ("<pad>", 2)]
        )
    return made


CASES = {
    # name: (tokenizer, first token of a window)
    "llama": (tokenizer("<s> $A"), 0),
    "begin-and-end": (tokenizer("<s> $A </s>"), 0),
    "opt": (tokenizer("</s> $A", begin="</s>"), 1),  # one token for begin and end
    "gpt2": (tokenizer("$A", begin="</s>"), None),  # the token exists, but encoding does not add it
    "end-only": (tokenizer("$A </s>"), None),
    "no-begin": (tokenizer("$A", begin=None), None),
    "other-in-front": (tokenizer("<pad> $A"), None),
}


def landed(store: Store, folder: Path, texts: list[str]) -> Shard:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return ingest(store, "general", [str(folder / "a.jsonl")], split="train").corpus.shards[0]


def drawn(store: Store, shard: Shard, each: PreTrainedTokenizerFast, request: WindowRequest) -> tuple[Pool, Tensor]:
    pool = draw_pool(store, [shard], each, DIGEST, request)
    return pool, torch.cat([windows_by_key(store, part.key) for part in pool.parts])


@pytest.mark.parametrize("name", CASES)
def test_the_begin_token_is_what_encoding_shows(name: str) -> None:
    each, expected = CASES[name]
    assert begin_token(each) == expected
    assert begin_token(each, False) is None


@pytest.mark.parametrize("name", CASES)
def test_every_window_begins_as_texts_do_and_never_twice(name: str, store: Store, tmp_path: Path) -> None:
    each, begin = CASES[name]
    shard = landed(store, tmp_path, TEXTS)
    sets = [
        drawn(store, shard, each, REQUEST)[1],
        random_windows(store, each, DIGEST, REQUEST).tokens_SL,
        generate_windows(store, tiny_llama(), DIGEST, each, DIGEST, REQUEST, first_tokens=None, batch=16).tokens_SL,
        windows_of(TEXTS, each, REQUEST.length, 100),
    ]
    for tokens_SL in sets:
        assert tokens_SL.shape[1] == REQUEST.length
        if begin is not None:
            assert (tokens_SL[:, 0] == begin).all()
            assert (tokens_SL[:, 1] != begin).all()
    if begin is None:  # documents joined and cut, as in earlier versions
        flat = windows_of(TEXTS, each, REQUEST.length).flatten().tolist()
        ids = [each(text)["input_ids"] for text in TEXTS]
        stream = [token for one in ids for token in (one if one[-1] == 1 else [*one, 1])]
        assert flat == stream[: len(flat)]


def test_the_plan_decides_where_it_says_so(store: Store, tmp_path: Path) -> None:
    shard, llama = landed(store, tmp_path, TEXTS), CASES["llama"][0]
    without = drawn(store, shard, llama, WindowRequest(12, 24, begin_token=False))[1]
    assert (without[:, 0] == 0).sum() < 12
    forced = drawn(store, shard, CASES["gpt2"][0], WindowRequest(12, 24, begin_token=True))[1]
    assert (forced[:, 0] == 1).all()
    with pytest.raises(CalibrationError, match=r"calibration\.begin_token: .*no beginning-of-text"):
        check_tokenizer(CASES["no-begin"][0], True, plain_text=False)


def test_keys_change_where_tokens_change_and_nowhere_else(store: Store, tmp_path: Path) -> None:
    shard = landed(store, tmp_path, TEXTS)
    before = digest_of(
        {
            "source": "documents",
            "rule": 1,
            "shard": shard.key,
            "split": "train",
            "tokenizer": DIGEST,
            "windows": 12,
            "length": 24,
            "seed": 0,
        }
    )  # key of these windows in earlier versions
    for name, (each, begin) in CASES.items():
        (part,) = drawn(store, shard, each, REQUEST)[0].parts
        assert (part.key == before) == (begin is None), name
        (part,) = drawn(store, shard, each, WindowRequest(12, 24, begin_token=False))[0].parts
        assert part.key == before
    llama = CASES["llama"][0]
    pools = [drawn(store, shard, llama, WindowRequest(12, 24, plain_text=plain))[0] for plain in (False, True)]
    assert len({pool.parts for pool in pools}) == 2


SPELLING = [text if index % 4 else f"{text} </s> it says <s>" for index, text in enumerate(TEXTS[:40])]


def test_documents_that_spell_a_special_token_are_counted_or_read_as_text(store: Store, tmp_path: Path) -> None:
    shard, llama = landed(store, tmp_path, SPELLING), CASES["llama"][0]
    pool, tokens_SL = drawn(store, shard, llama, WindowRequest(1000, 32))
    assert pool.spelling == 10
    assert drawn(store, shard, llama, WindowRequest(1000, 32))[0] == pool
    plain, plain_SL = drawn(store, shard, llama, WindowRequest(1000, 32, plain_text=True))
    assert plain.spelling == 0
    text = llama.decode([token for token in plain_SL.flatten().tolist() if token > 1])
    assert text.count("</s> it says <s>") >= 9  # the last may be in the tokens left over
    assert (plain_SL == 1).sum() <= len(SPELLING) < (tokens_SL == 1).sum()
    held = windows_of(SPELLING, llama, 32, plain_text=True)
    assert (held == 1).sum() <= len(SPELLING) < (windows_of(SPELLING, llama, 32) == 1).sum()
    assert llama("</s>")["input_ids"] == [0, 1], "the tokenizer is as it was"


@pytest.mark.parametrize("seed", range(200))
def test_nothing_is_left_out_or_repeated(seed: int) -> None:
    chance = random.Random(seed)
    documents = [chance.choices(range(4), k=chance.randrange(10)) for _ in range(chance.randrange(12))]
    length, begin = chance.randint(2, 7), chance.choice([None, 0, 1])
    windows, rest = [], []
    cutting = cut(documents, length, begin)
    while not rest:
        try:
            windows.append(next(cutting).tolist())
        except StopIteration as end:
            rest = [end.value.tolist()]
    assert all(len(window) == length for window in windows)
    stream = [token for document in documents for token in document]
    if begin is None:
        assert windows == [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        assert rest == [stream[len(windows) * length :]]
        return
    assert all(window[0] == begin != window[1] for window in windows)
    for window in windows:
        while stream[0] == begin:
            stream.pop(0)
        assert window[1:] == stream[: length - 1]
        del stream[: length - 1]
    assert rest == [stream]
    while stream[:1] == [begin]:
        stream.pop(0)
    assert len(stream) < length - 1


def test_the_first_token_is_read_and_not_scored() -> None:
    """The likelihood of a window that starts with `<s>` is that of the other tokens given `<s>`."""
    from crosscal.evaluation import window_nll

    model, tokens_SL = tiny_llama(), windows_of(TEXTS, CASES["llama"][0], 16, 3)
    with torch.inference_mode():
        log_SPV = model(input_ids=tokens_SL).logits.double().log_softmax(-1)[:, :-1]
    expected_S = -log_SPV.gather(2, tokens_SL[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(window_nll(model, tokens_SL, device="cpu"), expected_S, rtol=1e-5, atol=0)
