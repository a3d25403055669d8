"""Every user error ends with one clear message and its exit code, without a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_place import Place, crosscal, make_place, write_documents
from tests.helpers.tiny_text import tiny_tokenizer

PRUNE = {"method": "wanda", "sparsity": 0.5}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("finished"))
    place.run()
    return place


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    """A copy of a finished run, which a test may damage."""
    shutil.copytree(finished.folder, tmp_path / "place")
    copy = Place(tmp_path / "place")
    copy.write_plan()
    return copy


def fails(code: int, *says: str, arguments: tuple[str, ...]) -> None:
    done = crosscal(*arguments)
    assert done.code == code, done.err
    message = done.err.splitlines()[-1]
    assert message.startswith("crosscal: "), done.err
    assert "Traceback" not in done.err
    for text in says:
        assert re.search(text, message), message


def run(place: Place, *extra: str, out: str = "run2") -> tuple[str, ...]:
    return ("run", str(place.plan), "--home", str(place.home), "--out", str(place.folder / out), *extra)


WRONG_PLANS = {
    "unknown key": ({"calibratoin": {}}, 2, ["did you mean `calibration`"]),
    "unknown nested key": ({"calibration": {"lenght": 8}}, 2, ["did you mean `length`"]),
    "missing corpus file": ({"corpora": {"general": "gone.jsonl"}, "compress": [PRUNE]}, 1, ["gone.jsonl", "no such"]),
    "wrong model directory": ({"model": "./gone"}, 1, ["gone", "no such model directory"]),
    "a folder that is no model": ({"model": "general"}, 1, ["not a model directory", "config.json"]),
    "unknown method": ({"compress": [{"method": "sparse-gpt", "sparsity": 0.5}]}, 2, ["unknown method", "sparsegpt"]),
    "2:4 without quotes": ({"compress": [{"method": "wanda", "sparsity": 124}]}, 2, ["not a sparsity", '"2:4"']),
    "bits 9": ({"compress": [{"method": "rtn", "bits": 9}]}, 2, ["bits must be 2 to 8"]),
    "group size": ({"compress": [{"method": "rtn", "bits": 4, "group_size": 24}]}, 2, ["group_size must divide", "32"]),
    "n:m": ({"compress": [{"method": "wanda", "sparsity": "2:7"}]}, 2, ["divisible by 7"]),
    "unknown task": ({"evaluate": {"tasks": ["gone.jsonl"]}}, 1, ["gone.jsonl", "questions cannot be read"]),
    "no GPU": ({"execution": {"device": "cuda:7"}}, 2, ["no GPU"]),
    "no device": ({"execution": {"device": "gpu"}}, 2, ["not a device", "cuda:1"]),
    "a corpus nobody filled": ({"corpora": {"general": None}, "compress": [PRUNE]}, 1, ["crosscal ingest"]),
    "longer than the corpus": (
        {"corpora": {"general": "short"}, "compress": [PRUNE], "calibration": {"windows": 1, "length": 128}},
        1,
        ["does not fill one window", "shorter `length`"],
    ),
    "nothing usable": ({"corpora": {"general": "empty"}, "compress": [PRUNE]}, 1, ["no usable document"]),
}


@pytest.mark.parametrize("case", WRONG_PLANS, ids=str)
def test_a_wrong_plan(place: Place, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (place.folder / "short").mkdir()
    write_documents(place.folder / "short" / "train.jsonl", seed="short", count=1)
    (place.folder / "empty").mkdir()
    (place.folder / "empty" / "train.jsonl").write_text('{"text": "x"}\n')
    changes, code, says = WRONG_PLANS[case]
    place.write_plan(**changes)
    fails(code, *says, arguments=run(place))


def test_a_plan_that_cannot_be_read(place: Place) -> None:
    fails(2, "gone.yaml", "cannot be read", arguments=("run", str(place.folder / "gone.yaml")))
    place.plan.write_text("model: [")
    fails(2, "not valid YAML", arguments=run(place))
    place.plan.write_text("just words")
    fails(2, "mapping of fields", arguments=run(place))


def test_nonsense_for_set(place: Place) -> None:
    fails(2, "key=value", arguments=run(place, "--set", "nonsense"))
    fails(2, "compress.9", arguments=run(place, "--set", "compress.9.alpha=1"))
    fails(2, "unknown field", arguments=run(place, "--set", "nonsense=1"))


def test_pickled_weights_are_refused(place: Place) -> None:
    weights = place.folder / "model" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    fails(1, "pickled weights are never read", "safetensors", arguments=run(place))


def test_a_tokenizer_without_end_of_text(place: Place) -> None:
    tiny_tokenizer(end=False).save_pretrained(place.folder / "model")
    fails(1, "no end-of-text token", "eos_token", arguments=run(place))


def test_a_flipped_byte_is_named_with_its_remedy_which_works(place: Place) -> None:
    before = (place.run_dir / "results.jsonl").read_text()
    shutil.rmtree(place.run_dir)
    record = place.run()  # models are rebuilt from the cached moments
    assert record["calibration_tokens_read"] == 0
    assert (place.run_dir / "results.jsonl").read_text() == before
    damaged = next((place.home / "objects" / "moments").glob("*/gram.arrow"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    shutil.rmtree(place.home / "objects" / "made")  # lists run directories whose blocks would be reused
    fails(1, "does not match its digest", "crosscal store verify --quarantine", arguments=run(place))

    home = ("--home", str(place.home))
    assert crosscal("store", "verify", *home).code == 1
    assert crosscal("store", "verify", "--quarantine", *home).code == 1
    assert crosscal("store", "verify", *home).code == 0
    assert place.run("--out", str(place.folder / "run2"))["calibration_tokens_read"] > 0
    after = (place.folder / "run2" / "results.jsonl").read_text()
    assert [json.loads(row)["value"] for row in after.splitlines()] == [
        json.loads(row)["value"] for row in before.splitlines()
    ]


def test_the_directory_of_another_run(place: Place) -> None:
    place.write_plan(calibration={"windows": 4, "length": 32, "held_out_windows": 4})
    fails(2, "holds another run", "--out", arguments=run(place, out="run"))


def test_a_prefect_server_that_does_not_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    fails(2, "does not answer", "unset PREFECT_API_URL", arguments=run(place))


def test_a_store_that_cannot_be_written(place: Place) -> None:
    file = place.folder / "file"
    file.write_text("")
    arguments = ("run", str(place.plan), "--home", str(file / "home"), "--out", str(place.folder / "run2"))
    fails(1, "cannot be written", "CROSSCAL_HOME", arguments=arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store(place: Place) -> None:
    (place.folder / "locked").mkdir(mode=0o500)
    arguments = ("run", str(place.plan), "--home", str(place.folder / "locked" / "home"))
    fails(1, "cannot be written", arguments=arguments)


def test_a_run_directory_that_cannot_be_written(place: Place) -> None:
    (place.folder / "file").write_text("")
    fails(1, "file", arguments=run(place, out="file/run"))


def test_no_such_kind_in_the_store(place: Place) -> None:
    fails(2, "no such kind", "moments", arguments=("store", "list", "nonsense", "--home", str(place.home)))


def test_a_report_of_something_else(place: Place) -> None:
    fails(2, "results.jsonl", arguments=("report", str(place.folder / "general")))


SPOILED: dict[str, Callable[[Path], None]] = {
    "no such folder": shutil.rmtree,
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "another tokenizer": lambda model: tiny_tokenizer(begin=False).save_pretrained(model) and None,
}


@pytest.mark.parametrize("case", SPOILED)
def test_evaluating_what_cannot_be_evaluated(place: Place, case: str) -> None:
    model = place.folder / "other"
    shutil.copytree(place.folder / "model", model)
    SPOILED[case](model)
    code = 2 if case == "another tokenizer" else 1
    fails(code, "other", arguments=("evaluate", str(model), "--plan", str(place.plan), "--home", str(place.home)))


def test_a_bug_keeps_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosscal.flows.pipeline.samples_needed", lambda plan, asked: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        crosscal(*run(place))


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_a_condition_of_the_machine_is_no_bug(place: Place, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code), "/some/place")

    monkeypatch.setattr("crosscal.flows.pipeline.samples_needed", refused)
    fails(1, rf"^crosscal: /some/place: {os.strerror(code).lower()}\. \w+", arguments=run(place))


def test_an_empty_name_for_the_store(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    before = sorted(place.folder.iterdir())
    for command in (("store", "list"), ("ingest", "general", "--corpus", "general")):
        fails(2, "--home.*an empty name", arguments=(*command, "--home", ""))
    assert sorted(place.folder.iterdir()) == before
