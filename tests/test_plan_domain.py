"""A plan for any domain that lands: the domain's name is filled in everywhere, or the plan is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from crosscal.errors import PlanError
from crosscal.plan import dump_plan, load_plan
from crosscal.variants import variants
from tests.helpers.tiny_place import crosscal

PLAN = {
    "model": "org/model",
    "corpora": {"general": "org/$domain-or-not", "$domain": {}},
    "compress": [{"method": "wanda", "sparsity": 0.5, "domain": "$domain"}, {"method": "rtn", "bits": 4}],
    "publish": {"domain": "$domain", "guard": {"general": 0.1}},
}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    return tmp_path / "plan.yaml"


def test_the_name_stands_wherever_the_word_stood(template: Path, tmp_path: Path) -> None:
    plan = load_plan(template, ("corpora.$domain.text=body",), domain="legal")
    assert set(plan.document_corpora) == {"general", "legal"}
    assert plan.document_corpora["general"].path == ["org/legal-or-not"]
    assert plan.document_corpora["legal"].path is None
    assert plan.document_corpora["legal"].text == "body"
    assert plan.publish is not None
    assert plan.publish.domain == "legal"
    assert [variant.name for variant in variants(plan)] == ["wanda-50-legal-a0.5", "rtn-w4g128"]
    (tmp_path / "filled.yaml").write_text(dump_plan(plan))
    assert load_plan(tmp_path / "filled.yaml") == plan


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (None, "this plan is for a landed domain"),
        ("general", "an entry of this domain's name already"),
        ("../legal", "not a valid name"),
        ("$(touch x)", "not a valid name"),
        ("legal\n", "not a valid name"),
        ("", "not a valid name"),
        ("x" * 65, "not a valid name"),
    ],
)
def test_other_names_are_refused(template: Path, domain: str | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_plan(template, domain=domain)


def test_a_plan_without_the_word_takes_no_domain(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"model": "org/model", "corpora": {"general": "org/text"}}))
    with pytest.raises(PlanError, match="no place for a domain"):
        load_plan(tmp_path / "plan.yaml", domain="legal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"publish": {"domain": "medical"}}, "the perplexity on 'medical' is not measured"),
        ({"publish": {"domain": "$domain", "guard": {"other": 0.1}}}, "'other' is not measured"),
        ({"evaluate": {"perplexity": ["general"]}}, "'legal' is not measured"),
        ({"execution": {"keep_models": False}}, "there is no model to publish"),
        ({"publish": {"domain": "$domain", "tolerence": 0.1}}, "did you mean `tolerance`"),
        ({"publish": {"domain": "$domain", "tolerance": -1}}, "publish.tolerance"),
    ],
)
def test_publishing_that_cannot_be_decided_is_refused(template: Path, changes: dict[str, object], message: str) -> None:
    template.write_text(yaml.safe_dump({**PLAN, **changes}))
    with pytest.raises(PlanError, match=message):
        load_plan(template, domain="legal")


@pytest.mark.parametrize("command", [("run",), ("plan", "check"), ("plan", "show"), ("enough",), ("evaluate",)])
def test_whichever_command_asks_for_a_domain_takes_one(command: tuple[str, ...]) -> None:
    assert "--domain" in crosscal(*command, "--help").out


def test_a_plan_is_shown_for_a_domain(template: Path) -> None:
    asked = crosscal("plan", "show", str(template))
    assert (asked.code, asked.err.count("Give --domain NAME")) == (2, 1)
    assert yaml.safe_load(crosscal("plan", "show", str(template), "--domain", "legal").out)["corpora"].keys() == {
        "general",
        "legal",
    }
