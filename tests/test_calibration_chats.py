"""Conversations in windows: rendered as by transformers, not split across windows, one begin token per window."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosscal.calibration import Pool, WindowRequest, draw_pool
from crosscal.calibration.chats import TODAY, check_template, without_system
from crosscal.calibration.packing import Remainder, fill, nearest_sum, whole_turns
from crosscal.calibration.sets import windows_by_key
from crosscal.calibration.tokens import EncodedDocuments, chat_begin_token
from crosscal.corpora import Corpus, documents, ingest
from crosscal.corpora.conversation import Conversation
from crosscal.corpora.corpus import TEMPLATE, readings
from crosscal.errors import CalibrationError
from crosscal.evaluation import windows_of
from crosscal.store import Store
from tests.helpers.tiny_chats import TEMPLATES, chat_tokenizer, chats
from tests.helpers.tiny_text import SENTENCES

DIGEST = "0" * 64
CHATS = chats(120)
LENGTH = 192
EVERYTHING = WindowRequest(10_000, LENGTH)
Landing = Callable[..., Corpus]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def landed(store: Store, tmp_path: Path) -> Landing:
    def land(rows: list[dict[str, Any]], name: str = "chats") -> Corpus:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return ingest(store, name, [str(tmp_path / "a.jsonl")], split="train").corpus

    return land


def rows_of(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"messages": chat} for chat in found]


def by_transformers(tokenizer: PreTrainedTokenizerFast, turns: Any) -> list[int]:
    found: Any = tokenizer.apply_chat_template(list(turns), return_dict=False)
    return found


def drawn(
    store: Store, corpus: Corpus, each: PreTrainedTokenizerFast, request: WindowRequest = EVERYTHING
) -> tuple[Pool, Tensor]:
    pool = draw_pool(store, corpus.shards, each, DIGEST, request)
    return pool, torch.cat([windows_by_key(store, part.key) for part in pool.parts])


def accepted(template: str, turns: Any) -> Any:
    return without_system(turns) if template == "no-system" else turns


@pytest.mark.parametrize("plain_text", [False, True])
def test_one_corpus_serves_every_template(plain_text: bool, store: Store, landed: Landing) -> None:
    (shard,) = landed(rows_of(CHATS)).shards
    for name in TEMPLATES:
        tokenizer = chat_tokenizer(name)
        encoded = EncodedDocuments(tokenizer, readings(store, shard, "train", TEMPLATE), 1, plain_text=plain_text)
        expected = [by_transformers(tokenizer, accepted(name, chat)) for chat in CHATS]
        found = [chat.ids for chat in encoded if not isinstance(chat, list)]
        assert sorted(found) == sorted(expected), name
        assert encoded.tokens == sum(map(len, found))
        assert list(encoded.said.values()) == ([40] if name == "no-system" else [])
        assert encoded.spelling == 0


def units_in(window: list[int], units: list[list[int]], begin: int | None) -> tuple[list[int], list[int]]:
    """Return the indices of the units that a window contains whole, and the tokens after them."""
    found: list[int] = []
    if begin is not None and window[0] == begin and not any(unit[0] == begin for unit in units):
        window = window[1:]
    while window:
        fits = [place for place, unit in enumerate(units) if window[: len(unit)] == unit]
        if not fits:
            break
        found.append(fits[0])
        window = window[len(units[fits[0]]) :]
    return found, window


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_windows_hold_whole_conversations_once_and_begin_once(
    name: str, begin: bool, store: Store, landed: Landing
) -> None:
    tokenizer, corpus = chat_tokenizer(name, begin=begin), landed(rows_of(CHATS))
    pool, tokens_SL = drawn(store, corpus, tokenizer)
    units = [by_transformers(tokenizer, accepted(name, chat)) for chat in CHATS]
    assert max(map(len, units)) < LENGTH
    first = chat_begin_token(tokenizer)
    assert (first is not None) == (begin or name in ("begin-once", "no-system", "generation"))
    seen: Counter[int] = Counter()
    repeated = 0
    for window in tokens_SL.tolist():
        whole, behind = units_in(window, units, first)
        seen.update(whole)
        assert not behind or any(unit[: len(behind)] == behind and len(unit) > len(behind) for unit in units)
        repeated += len(behind)
        if first is not None:
            assert window[0] == first != window[1]
            own = sum(unit.count(first) for unit in (*(units[place] for place in whole), behind))
            assert window.count(first) == own or window.count(first) == own + 1 == 1
    for left in pool.chat_rest:
        seen[units.index(list(left))] += 1
    assert seen == Counter(range(len(units)))
    assert repeated == pool.tokens_repeated
    assert pool.tokens_used == sum(map(len, units)) - pool.left.tokens
    pool, tokens_SL = drawn(store, corpus, tokenizer, WindowRequest(10_000, 4 * LENGTH))
    assert pool.tokens_repeated < 0.02 * tokens_SL.numel(), "with some to choose from windows are filled exactly"


def test_the_plan_decides_about_the_beginning_where_it_says_so(store: Store, landed: Landing) -> None:
    corpus, once, bare = landed(rows_of(CHATS)), chat_tokenizer("begin-once"), chat_tokenizer("turns", begin=False)
    without = drawn(store, corpus, once, WindowRequest(9, LENGTH, begin_token=False))[1]
    assert all(window[0] == 0 for window in without.tolist()), "what the template writes stays"
    assert chat_begin_token(bare) is None
    forced = drawn(store, corpus, bare, WindowRequest(9, LENGTH, begin_token=True))[1]
    assert all(window.count(0) == 1 and window[0] == 0 for window in forced.tolist())


def test_a_long_conversation_is_cut_between_turns_and_only_a_long_turn_in_itself(store: Store, landed: Landing) -> None:
    long = [{"role": role, "content": " ".join(SENTENCES[:count])} for count in (1, 2, 1) for role in ("user", "gpt")]
    huge = [{"role": "user", "content": " ".join(SENTENCES * 3)}, {"role": "assistant", "content": "So it is."}]
    corpus = landed(rows_of([long, huge]))
    tokenizer = chat_tokenizer("begin-once")
    for shard_chat in readings(store, corpus.shards[0], "train", TEMPLATE):
        (chat,) = EncodedDocuments(tokenizer, [shard_chat], 1)
        assert not isinstance(chat, list)
        turns = chat.by_turn()
        assert list(chain(*turns)) == chat.ids
        texts = [str(tokenizer.decode(turn)).removeprefix("<s>") for turn in turns]
        assert texts == [f"<pad>{turn['role']}\n{turn['content']}</s>\n" for turn in chat.turns]
    _, tokens_SL = drawn(store, corpus, tokenizer, WindowRequest(100, 64))
    opened = [str(tokenizer.decode(window[1:4])) for window in tokens_SL]
    assert sum(text.startswith("<pad>") for text in opened) >= len(opened) - 3  # some continue the long turn
    assert all(window[0] == 0 != window[1] for window in tokens_SL.tolist())


@pytest.mark.parametrize("seed", range(100))
def test_pieces_of_turns_are_all_of_them(seed: int) -> None:
    chance = random.Random(seed)
    turns = [[number] * chance.randint(1, 30) for number in range(chance.randrange(12))]
    room = chance.randint(2, 40)
    pieces = [list(piece) for piece in whole_turns(turns, room)]
    assert list(chain(*pieces)) == list(chain(*turns))
    assert all(0 < len(piece) <= room for piece in pieces)
    for one, two in pairwise(pieces):
        assert one[-1] != two[0] or len(turns[one[-1]]) > room, "only a turn that is too long is cut"
        assert len(one) + len(turns[two[0]]) > room, "as many turns as fit"


@pytest.mark.parametrize("seed", range(200))
def test_the_sum_is_the_nearest_and_of_the_first(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 40) for _ in range(chance.randrange(10))]
    wanted = chance.randrange(80)

    def best(count: int) -> int:
        sums = (sum(some) for size in range(count + 1) for some in combinations(lengths[:count], size))
        return max(each for each in sums if each <= wanted)

    chosen = nearest_sum(lengths, wanted)
    found = sum(lengths[place] for place in chosen)
    assert found == best(len(lengths))
    if found == wanted and chosen:
        assert best(max(chosen)) < wanted, "none of those behind is needed"


@pytest.mark.parametrize("seed", range(100))
def test_every_unit_stands_once_in_windows_of_any_length(seed: int) -> None:
    chance = random.Random(seed)
    length, begin = chance.randint(4, 60), chance.choice([None, 0])
    room = length - (begin is not None)
    units = [
        tuple(range(1000 * number, 1000 * number + chance.randint(1, room)))
        for number in range(1, chance.randint(2, 40))
    ]
    filling = fill([], length, None, begin, Remainder((), tuple(units)))
    seen: list[int] = []
    rest = None
    while rest is None:
        try:
            window = next(filling)
        except StopIteration as end:
            rest = end.value
            continue
        tokens = window.tokens_L.tolist()
        assert len(tokens) == length
        kept = tokens[: length - window.repeated][begin is not None :]
        assert len(kept) == window.taken
        assert tokens[: begin is not None] == [begin] * (begin is not None)
        behind = tokens[length - window.repeated :]
        assert not behind or any(list(unit[: len(behind)]) == behind for unit in units)
        seen += kept
    assert Counter(seen) + Counter(chain(*rest.chats)) == Counter(chain(*units))
    starts = {unit[0] for unit in units}
    assert all(place == 0 or token == seen[place - 1] + 1 or token in starts for place, token in enumerate(seen))
    assert rest.tokens < length


def test_what_landings_leave_is_pooled(store: Store, landed: Landing) -> None:
    """Conversations of several shards: each is in a window or among the conversations left over."""
    tokenizer = chat_tokenizer("begin-once")
    texts = [{"text": f"{number} {' '.join(SENTENCES[:3])}"} for number in range(10)]
    for batch in (CHATS[:30], CHATS[30:31], CHATS[31:33], CHATS[33:90]):
        corpus = landed([*rows_of(batch), *texts[: len(batch) % 7]])
    pool, tokens_SL = drawn(store, corpus, tokenizer)
    assert drawn(store, corpus, tokenizer)[0] == pool
    found = [*tokens_SL.flatten().tolist(), *chain(pool.rest, *pool.chat_rest)]
    units = [by_transformers(tokenizer, chat) for chat in CHATS[:90]]
    assert all(f"user\n{number} " in tokenizer.decode(found) for number in range(90) if number % 3)
    assert found.count(2) >= sum(unit.count(2) for unit in units)


def test_keys_follow_what_changes_tokens(store: Store, landed: Landing) -> None:
    chat, text = landed(rows_of(CHATS)), landed([{"text": sentence} for sentence in SENTENCES * 3], "texts")
    cases = [(name, "template") for name in ("turns", "begin-once")] + [("turns", "text"), ("begin-once", "text")]
    keys = {
        (name, how, corpus.name): drawn(store, corpus, chat_tokenizer(name), WindowRequest(2, 32, chat=how))[0].key
        for name, how in cases
        for corpus in (chat, text)
    }
    assert len({keys[name, how, "chats"] for name, how in cases}) == 3, "as text no template matters"
    assert len({keys[name, how, "texts"] for name, how in cases}) == 1


def test_windows_without_what_only_the_template_writes_have_a_key_of_their_own(store: Store, landed: Landing) -> None:
    corpus, each = landed(rows_of(CHATS)), chat_tokenizer("begin-once", begin=False)
    usual, without = (drawn(store, corpus, each, WindowRequest(4, 32, begin_token=asked)) for asked in (None, False))
    assert (usual[1][:, 0] == 0).all()
    assert not (without[1][:, 0] == 0).all()
    assert usual[0].key != without[0].key
    bare = chat_tokenizer("turns", begin=False)
    alike = {drawn(store, corpus, bare, WindowRequest(4, 32, begin_token=asked))[0].key for asked in (None, False)}
    assert len(alike) == 1, "equal windows have one key"


def test_as_text_a_conversation_is_what_its_turns_say(store: Store, landed: Landing) -> None:
    corpus, bare = landed(rows_of(CHATS)), chat_tokenizer(None)
    texts = list(documents(store, corpus.shards[0], "train"))
    assert sorted(texts) == sorted("\n\n".join(turn["content"] for turn in chat) for chat in CHATS)
    request = WindowRequest(10_000, 64, chat="text")
    pool, tokens_SL = drawn(store, corpus, bare, request)
    assert torch.equal(tokens_SL, drawn(store, corpus, chat_tokenizer("begin-once"), request)[1])
    assert (tokens_SL == 1).sum() + pool.rest.count(1) == len(CHATS), "each is closed by end-of-text, as texts are"


def test_a_model_without_a_template_is_refused_with_the_remedy(store: Store, landed: Landing) -> None:
    corpus = landed(rows_of(CHATS))
    with pytest.raises(CalibrationError, match=r"corpora\.chats: .*no chat template.*Set `chat: text`"):
        check_template(chat_tokenizer(None), "chats")
    check_template(chat_tokenizer("turns"), "chats")
    pool, _ = drawn(store, corpus, chat_tokenizer(None), WindowRequest(9, 64, chat="text"))
    assert pool.windows == 9


SPELLING = [
    [{"role": "user", "content": f"{number} it says </s> and <s>"}, {"role": "assistant", "content": "<pad>user\nyes"}]
    for number in range(40)
]


def test_what_a_turn_spells_is_counted_or_read_as_text(store: Store, landed: Landing) -> None:
    corpus, tokenizer = landed(rows_of([*SPELLING, *CHATS[:10]])), chat_tokenizer("begin-once")
    pool, tokens_SL = drawn(store, corpus, tokenizer)
    assert pool.spelling == 40
    plain, plain_SL = drawn(store, corpus, tokenizer, WindowRequest(10_000, LENGTH, plain_text=True))
    assert plain.spelling == 0
    turns = 2 * 40 + sum(map(len, CHATS[:10]))
    in_all = [plain_SL.flatten().tolist(), *map(list, plain.chat_rest)]
    assert sum(ids.count(1) for ids in in_all) >= turns  # one per turn from the template, plus a few repeated tokens
    assert sum(ids.count(1) for ids in in_all) < turns + 10 < (tokens_SL == 1).sum()
    assert tokenizer.decode(plain_SL.flatten()).count("it says </s> and <s></s>") >= 36
    assert tokenizer("</s>")["input_ids"] == [0, 1], "the tokenizer is as it was"


def test_what_a_template_refuses_is_left_out_and_told(store: Store, landed: Landing) -> None:
    odd = "{% if messages | length > 2 %}{{ raise_exception('Roles must alternate') }}{% endif %}" + TEMPLATES["turns"]
    pool, _ = drawn(store, landed(rows_of(CHATS)), chat_tokenizer(odd))
    left_out = sum(len(without_system(chat)) > 2 for chat in CHATS)
    merged = sum(len(chat) > 2 >= len(without_system(chat)) for chat in CHATS)
    refused, system = sorted(pool.said)
    assert "Roles must alternate" in refused
    assert pool.said == {refused: left_out, system: merged}


def test_windows_do_not_depend_on_the_day(store: Store, landed: Landing) -> None:
    dated = "Today is {{ strftime_now('%d %B %Y') }}, {{ strftime_now(\"%A\") }}.\n" + TEMPLATES["turns"]
    _, tokens_SL = drawn(store, landed(rows_of(CHATS)), chat_tokenizer(dated))
    assert str(chat_tokenizer(None).decode(tokens_SL[0][1:40])).startswith(f"Today is {TODAY:%d %B %Y}, {TODAY:%A}.\n")


def test_calls_of_tools_are_rendered(store: Store, landed: Landing) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 1}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "What is one and two, please?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    corpus, tokenizer = landed([{"messages": turns, "tools": tools}]), chat_tokenizer("tools")
    (chat,) = EncodedDocuments(tokenizer, readings(store, corpus.shards[0], "train", TEMPLATE), 1)
    assert not isinstance(chat, list)
    expected: Any = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
    assert chat.ids == expected
    assert str(tokenizer.decode(chat.ids)).endswith('{"name": "add", "arguments": {"b": 2, "a": 1}}</s>\n')


def test_test_windows_are_made_the_same_way() -> None:
    tokenizer, found = chat_tokenizer("begin-once"), [Conversation(tuple(chat)) for chat in CHATS]
    tokens_SL = windows_of(found, tokenizer, LENGTH, 8)
    units = [by_transformers(tokenizer, chat) for chat in CHATS]
    assert tokens_SL.shape == (8, LENGTH)
    assert all(units_in(window, units, 0)[0] for window in tokens_SL.tolist())
