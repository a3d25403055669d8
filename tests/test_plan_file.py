"""Plans: every default is written back, paths are relative to the plan's folder, mistakes are named with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from crosscal.errors import PlanError
from crosscal.plan import dump_plan, load_plan, parse_plan
from crosscal.resources import ROOT

LEAST = {"model": "owner/name", "corpora": {"general": None}}


def written(folder: Path, content: dict) -> Path:
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_every_default_is_written_back_and_equal_after_reloading(tmp_path: Path) -> None:
    content = {
        **LEAST,
        "corpora": {"general": "general.txt", "own": "self", "noise": "random", "two": {"path": ["a.txt", "b.txt"]}},
        "compress": [{"method": "sparsegpt", "sparsity": [0.5, "2:4"]}],
    }
    plan = load_plan(written(tmp_path, content))
    text = dump_plan(plan)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load_plan(written(elsewhere, yaml.safe_load(text))) == plan
    dumped = yaml.safe_load(text)
    assert dumped["calibration"] == {
        "windows": 128,
        "length": 2048,
        "seed": 0,
        "held_out_windows": 16,
        "parts_kept_apart": 4,
        "begin_token": None,
        "plain_text": False,
        "sufficiency": False,
        "batch_tokens": 4096,
    }
    assert dumped["compress"][0]["damping"] == [0.01]
    assert dumped["compress"][0]["upstream"] == ["dense"]
    assert dumped["corpora"]["own"]["t_init"] == 1.0
    assert dumped["execution"] == {
        "device": "auto",
        "keep_models": True,
        "runner": "threads",
        "address": None,
        "workers": None,
        "part_tokens": 65536,
    }


@pytest.mark.parametrize(
    ("execution", "said"),
    [
        ({"workers": 2}, "runner: dask"),
        ({"runner": "dask", "workers": 2, "address": "tcp://scheduler:8786"}, "an address or a number"),
        ({"runner": "dask", "address": "http://scheduler:8787"}, "execution.address"),
        ({"runner": "dask", "workers": 0}, "execution.workers"),
        ({"runner": "ray"}, "'threads' or 'dask'"),
    ],
)
def test_a_cluster_is_asked_for_in_one_way(tmp_path: Path, execution: dict[str, object], said: str) -> None:
    content = {"model": "model", "corpora": {"general": "general.txt"}, "execution": execution}
    with pytest.raises(PlanError, match=said):
        load_plan(written(tmp_path, content))


def test_relative_paths_belong_to_the_plans_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "model").mkdir()
    content = {
        "model": "model",
        "corpora": {"general": "texts", "later": "*.jsonl", "hub": "owner/data", "absolute": "/data/x.jsonl"},
        "evaluate": {"tasks": ["questions.jsonl", "arc_easy"]},
    }
    written(tmp_path, content)
    monkeypatch.chdir("/")
    plan = load_plan(tmp_path / "plan.yaml")
    paths = {name: source.path for name, source in plan.document_corpora.items()}
    assert plan.model == str(tmp_path / "model")
    assert paths["general"] == [str(tmp_path / "texts")]
    assert paths["later"] == [str(tmp_path / "*.jsonl")]
    assert paths["hub"] == ["owner/data"]
    assert paths["absolute"] == ["/data/x.jsonl"]
    assert plan.evaluate.tasks == [str(tmp_path / "questions.jsonl"), "arc_easy"]


def test_overrides_reach_every_field(tmp_path: Path) -> None:
    file = written(tmp_path, {**LEAST, "compress": [{"method": "wanda", "sparsity": 0.5}]})
    overrides = ("calibration.windows=7", "compress.0.sparsity=[0.1, 0.2]", "evaluate.limit=3", "corpora.noise=random")
    plan = load_plan(file, overrides)
    assert plan.calibration.windows == 7
    assert plan.compress[0].sparsity == [0.1, 0.2]
    assert plan.evaluate.limit == 3
    assert plan.corpora["noise"].source == "random"


@pytest.mark.parametrize(
    ("written_as", "override", "meant"),
    [
        ("legal.jsonl", "corpora.legal.text=body", {"path": "legal.jsonl", "text": "body"}),
        ("legal.jsonl", "corpora.legal.chat=text", {"path": "legal.jsonl", "chat": "text"}),
        ("legal.jsonl", "corpora.legal.select.documents=5", {"path": "legal.jsonl", "select": {"documents": 5}}),
        (["a.txt", "b.txt"], "corpora.legal.split=train", {"path": ["a.txt", "b.txt"], "split": "train"}),
        (["a.txt", "b.txt"], "corpora.legal.1=c.txt", ["a.txt", "c.txt"]),
        ("self", "corpora.legal.t_init=2.0", {"source": "self", "t_init": 2.0}),
        (None, "corpora.legal.text=body", {"text": "body"}),
        (
            {"path": "a.txt", "select": None},
            "corpora.legal.select.documents=5",
            {"path": "a.txt", "select": {"documents": 5}},
        ),
    ],
)
def test_overrides_reach_below_a_corpus_in_short_form(
    tmp_path: Path, written_as: object, override: str, meant: object
) -> None:
    plan = load_plan(written(tmp_path, {**LEAST, "corpora": {"legal": written_as}}), (override,))
    assert plan == load_plan(written(tmp_path, {**LEAST, "corpora": {"legal": meant}}))


@pytest.mark.parametrize("override", ["windows", "compress.7.alpha=1", "compress.x.alpha=1", "model.name=1", "a=[1"])
def test_an_override_that_names_no_field_is_refused(tmp_path: Path, override: str) -> None:
    file = written(tmp_path, {**LEAST, "compress": [{"method": "wanda", "sparsity": 0.5}]})
    with pytest.raises(PlanError):
        load_plan(file, (override,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modle": "x"}, "did you mean `model`"),
        ({"calibration": {"window": 3}}, "did you mean `windows`"),
        ({"calibration": {"windows": 0}}, "calibration.windows"),
        ({"compress": [{"sparsity": 0.5}]}, "compress.0.method: this field is needed"),
        ({"compress": [{"method": "wanda", "sparsity": 0.5, "domain": "law"}]}, "no corpus 'law'"),
        (
            {"compress": [{"method": "wanda", "sparsity": 0.5, "domain": "general", "alpha": 1.5}]},
            "less than or equal to 1",
        ),
        ({"evaluate": {"perplexity": ["law"]}}, "no corpus of documents"),
        ({"corpora": {"General!": "x"}}, "General!"),
        ({"corpora": {}}, "corpora"),
    ],
)
def test_mistakes_are_named(change: dict, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        parse_plan({**LEAST, **change})


def one_corpus(source: object, name: str = "legal") -> dict:
    return {"corpora": {name: source}}


def one_method(**settings: object) -> dict:
    return {"compress": [{"method": "wanda", "sparsity": 0.5, "domain": "general", **settings}]}


def one_mixture(weights: object) -> dict:
    return {"compress": [{"method": "wanda", "sparsity": 0.5, "mixture": weights}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_corpus({"source": "self", "drop": 3}), "corpora.legal.drop: "),
        (one_corpus({"source": "random", "path": "x"}), "corpora.legal.path: unknown field"),
        (one_corpus({"select": {"documents": 0}}), "corpora.legal.select.documents: "),
        (one_corpus({"txt": "body"}, "documents"), "corpora.documents.txt: unknown field; did you mean `text`"),
        (one_corpus({"txt": "body"}, "rule"), "corpora.rule.txt: unknown field; did you mean `text`"),
        (one_corpus({"source": "self", "step": 3}, "self"), "corpora.self.step: unknown field; did you mean `steps`"),
        (one_corpus(["a.txt", 3]), "corpora.legal.path.1: "),
        (one_corpus("a.txt", "General!"), "corpora.General!: "),
        (one_method(alpha="auto2"), "compress.0.alpha.0: "),
        (one_method(alpha={"auto": {"general_within": 3}}), "compress.0.alpha.0.auto.general_within: "),
        (
            one_method(alpha={"auto": {"general_within": 0.1, "foo": 2}}),
            "compress.0.alpha.0.auto.foo: unknown field; known fields: general_within",
        ),
        (one_method(alpha={"aut": 1}), "compress.0.alpha.0.aut: unknown field; did you mean `auto`"),
        (one_mixture("auto2"), "compress.0.mixture.0: "),
        (one_mixture({"number": "x"}), "compress.0.mixture.0.number: "),
        (one_mixture({"auto": {"general": 1, "exponents": 0}}), "compress.0.mixture.0.auto.exponents: "),
        (
            one_mixture({"auto": {"general": 1, "legal": 1}, "foo": 2}),
            "compress.0.mixture.0.foo: unknown field; known fields: auto",
        ),
        ({"calibration": {"seed": [0, "x"]}}, "calibration.seed.1: "),
        ({"evaluate": {"allow_leaks": [3]}}, "evaluate.allow_leaks.0: "),
        ({"evaluate": {"tasks": [{"file": "a.csv", "fields": {"choices": 3}}]}}, "evaluate.tasks.0.fields.choices: "),
    ],
)
def test_mistakes_are_named_by_the_fields_that_a_plan_has(change: dict, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan({**LEAST, **change})
    assert f" {says}" in str(caught.value), "the location stands in full behind `plan:` or another mistake"


@pytest.mark.parametrize("deep", ["[" * 10_000, "{a: " * 10_000])
def test_nesting_without_end_is_no_valid_yaml(tmp_path: Path, deep: str) -> None:
    (tmp_path / "plan.yaml").write_text(deep)
    with pytest.raises(PlanError, match="not valid YAML"):
        load_plan(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="names no field"):
        load_plan(written(tmp_path, LEAST), (f"compress={deep}",))


@pytest.mark.parametrize("task", ["facts.jsonl", "facts.ndjson", "facts.json.XZ", "facts.jsonl.bz2", "arc_easy"])
def test_paths_of_questions_belong_to_the_plans_folder(tmp_path: Path, task: str) -> None:
    plan = load_plan(written(tmp_path, {**LEAST, "evaluate": {"tasks": [task]}}))
    assert plan.evaluate.tasks == [task if task == "arc_easy" else str(tmp_path / task)]


def test_a_plan_that_comes_with_crosscal_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("plans/one_model.yaml")
    assert load_plan(name) == load_plan(ROOT / name)
    (tmp_path / "plans").mkdir()
    (tmp_path / name).write_text((ROOT / name).read_text().replace("windows: ", "windows: 1"))
    assert load_plan(name) != load_plan(ROOT / name), "one's own comes first"
