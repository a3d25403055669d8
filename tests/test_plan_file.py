"""Plans: every default is written back, paths are relative to the plan's folder, mistakes are named with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from crosscal.errors import PlanError
from crosscal.plan import dump_plan, load_plan, parse_plan
from crosscal.plan.mistakes import task_names
from crosscal.resources import ROOT
from crosscal.tasks.questions import ready_tasks

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


@pytest.mark.parametrize("source", [[], {"path": []}, {"path": [], "split": "train"}])
def test_a_corpus_of_no_sources_is_refused(tmp_path: Path, source: object) -> None:
    with pytest.raises(PlanError, match=r"plan\.yaml: corpora\.legal\.path: an empty list of sources"):
        load_plan(written(tmp_path, {**LEAST, **one_corpus(source)}))


ASKED = [
    "arc_easy",
    "exam.jsonl",
    "a/bar.csv",
    "b/bar.csv.gz",
    "facts (2).jsonl",
    {"file": "own.jsonl", "name": "named"},
    {"file": "own.jsonl", "versions": ["closed", "in_context"]},
    {"continuation": "legal"},
    {"perplexity": "text.txt"},
    {"summaries": "briefs.jsonl"},
]
CORPORA = {"general": None, "legal": None, "noise": "random"}


@pytest.mark.parametrize("typo", ["nope", "Legal", "legal (train)", "exam.jsonl", "bar", "own", "closed", ""])
def test_a_leak_allowed_for_what_the_plan_does_not_have_is_a_typo(tmp_path: Path, typo: str) -> None:
    evaluate = {"tasks": ASKED, "allow_leaks": ["legal", typo]}
    with pytest.raises(PlanError) as caught:
        load_plan(written(tmp_path, {**LEAST, "corpora": CORPORA, "evaluate": evaluate}))
    known = "general, legal, noise, arc_easy, exam, a_bar, b_bar, facts (2), named, own-closed, own-in_context"
    said = f"evaluate.allow_leaks: {typo!r} is no corpus and no task of this plan; those are: {known}, "
    assert str(caught.value) == f"{tmp_path / 'plan.yaml'}: {said}legal-continuation, text, briefs"


def test_a_leak_is_allowed_by_the_name_of_a_corpus_a_task_or_one_set(tmp_path: Path) -> None:
    names = ["general", "legal (test)", "general (validation)", "noise", "arc_easy", "exam", "a_bar", "b_bar", "named"]
    names += ["facts", "facts (2)", "own-closed", "own-in_context", "legal-continuation", "text", "briefs"]
    for allowed in (names, [], True, False):
        content = {**LEAST, "corpora": CORPORA, "evaluate": {"tasks": ASKED, "allow_leaks": allowed}}
        assert load_plan(written(tmp_path, content)).evaluate.allow_leaks == allowed


def test_names_of_tasks_are_those_of_a_run(tmp_path: Path) -> None:
    row = {"context": "It rained.", "question": "Was it wet?", "choices": ["yes", "no"], "answer": 0}
    for file in ("exam.jsonl", "a/bar.jsonl", "b/bar.jsonl", "facts (2).json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(row) + "\n")
    (tmp_path / "text.txt").write_text("It rained.")
    versions = ["closed", "in_context"]
    tasks = ["arc_easy", "exam.jsonl", "a/bar.jsonl", "b/bar.jsonl", {"file": "facts (2).json", "name": "named"}]
    tasks += [{"file": "facts (2).json", "versions": versions, "fields": {"context": "context"}}]
    tasks += [{"perplexity": "text.txt"}]
    plan = load_plan(written(tmp_path, {**LEAST, "evaluate": {"tasks": tasks}}))
    assert set(task_names(plan)) == {task if isinstance(task, str) else task.name for task in ready_tasks(plan)}


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
