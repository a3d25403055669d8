"""Variants: the product of the axes, each model once, each name usable as a folder."""

from __future__ import annotations

import re

import pytest
import yaml

from crosscal.compressors import COMPRESSORS
from crosscal.compressors.recipe import any_step
from crosscal.errors import PlanError
from crosscal.plan import dump_plan, parse_plan
from crosscal.statistics import Mixture
from crosscal.variants import BEGIN, samples_needed, variants

CORPORA = {"general": None, "legal": None, "biomedical": None}


def expand(*entries: dict, **changes) -> list:
    return variants(parse_plan({"model": "m", "corpora": CORPORA, "compress": list(entries), **changes}))


def test_a_list_on_any_axis_is_swept() -> None:
    found = expand(
        {
            "method": ["sparsegpt", "wanda"],
            "sparsity": [0.5, "2:4"],
            "domain": ["legal", "biomedical"],
            "alpha": [0.5, 1],
            "upstream": ["dense", "sequential"],
        }
    )
    assert len(found) == 2 * 2 * 2 * 2 * 2
    assert len({variant.key for variant in found}) == len(found)


def test_a_model_asked_for_twice_is_made_once() -> None:
    # alpha 0 is the general corpus alone, whatever the domain; a data-free method ignores mixture, seed and upstream
    alone = expand({"method": "wanda", "sparsity": 0.5, "domain": ["legal", "biomedical"], "alpha": 0})
    assert [variant.name for variant in alone] == ["wanda-50-general"]
    free = expand(
        {
            "method": "magnitude",
            "sparsity": 0.5,
            "domain": ["legal", "biomedical"],
            "upstream": ["dense", "sequential"],
        },
        {"method": "magnitude", "sparsity": [0.5]},
        calibration={"seed": [0, 1]},
    )
    assert [variant.name for variant in free] == ["magnitude-50"]
    same = expand(
        {"method": "wanda", "sparsity": 0.5, "domain": "legal", "alpha": 0.5},
        {"method": "wanda", "sparsity": 0.5, "mixture": {"general": 0.5, "legal": 0.5}},
    )
    assert len(same) == 1


def test_draws_of_one_recipe_share_a_name_before_the_draw() -> None:
    """Two recipes whose names are equal get a part of their key, which no draw changes."""
    wanda = {"method": "wanda", "sparsity": 0.5}
    found = expand(wanda, {**wanda, "fallback": "keep-dense"}, calibration={"seed": [0, 1, 2]})
    stems = {(variant.fallback, variant.name.removesuffix(f"-s{variant.seed}")) for variant in found}
    assert len(found) == len({variant.name for variant in found}) == 6
    assert len(stems) == len({stem for _, stem in stems}) == 2
    one_draw = expand(wanda, {**wanda, "fallback": "keep-dense"}, calibration={"seed": [5]})
    assert [variant.name for variant in one_draw] == [f"wanda-50-general-{variant.key[:6]}" for variant in one_draw]


def test_names_are_unique_and_safe_as_folders() -> None:
    found = expand(
        {
            "method": [
                name
                for name, method in COMPRESSORS.items()
                if method.kind in set(BEGIN) - {"correct"} and name != "3basil"
            ],
            "sparsity": [0.5, 0.55, 0.555, 0, 1, "2:4", "1:4"],
            "bits": [2, 4, 8],
            "group_size": [128, 32, None],
            "damping": [0.01, 0.1],
            "activation_order": [True, False],
            "domain": "legal",
            "alpha": [0, 1 / 3, 0.5, 1],
            "trace_normalised": True,
        },
        {"method": "wanda", "sparsity": 0.5, "mixture": [{"general": 0.2, "legal": 0.3, "biomedical": 0.5}]},
        {"method": "wanda", "sparsity": 0.5, "mixture": [{"legal": 0.5, "biomedical": 0.5}], "fallback": "keep-dense"},
        {"method": "wanda", "sparsity": 0.5, "mixture": [{"legal": 0.5, "biomedical": 0.5}]},
        calibration={"seed": [0, 1]},
    )
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names)
    assert len({name.lower() for name in names}) == len(names)  # some file systems ignore case
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,199}", name) for name in names)


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"alpha": [0.3, 0.7]}, "compress.0.alpha"),
        ({"alpha": 0.5}, "compress.0.alpha"),
        ({"alpha": "auto"}, "compress.0.alpha"),
        ({"alpha": 0.7, "mixture": {"general": 1}}, "compress.0.alpha"),
        ({"domain": "legal", "mixture": {"general": 1}}, "compress.0.domain"),
    ],
)
def test_weights_without_effect_are_refused(entry: dict, place: str) -> None:
    step = {"method": "sparsegpt", "sparsity": 0.5}
    with pytest.raises(PlanError, match=place):
        expand({**step, **entry})
    with pytest.raises(PlanError, match=place.replace("0.", "0.steps.0.")):
        expand({"steps": [{**step, **entry}, {"method": "refit"}]})


def test_alpha_0_needs_no_domain_and_a_step_weighs_the_domain_of_its_recipe() -> None:
    step = {"method": "sparsegpt", "sparsity": 0.5, "alpha": 0}
    assert [variant.name for variant in expand(step)] == ["sparsegpt-50-general"]
    [of_a_step] = expand({"domain": "legal", "steps": [{**step, "alpha": 0.25}, {"method": "refit"}]})
    assert of_a_step.steps[0].mixture == Mixture.alpha("legal", 0.25)


@pytest.mark.parametrize("name", ["method", "sparsity", "domain", "alpha", "mixture", "upstream", "steps"])
def test_an_empty_axis_is_refused_by_name(name: str) -> None:
    """It would remove the entry from the sweep."""
    entry = {"method": "sparsegpt", "sparsity": 0.5, name: []}
    if name == "steps":
        entry = {"steps": []}
    with pytest.raises(PlanError, match=f"compress.0.{name}: an empty list"):
        expand(entry)


def test_a_sweep_needs_a_seed() -> None:
    with pytest.raises(PlanError, match=r"calibration\.seed: no seed"):
        expand({"method": "rtn", "bits": 4}, calibration={"seed": []})


def test_one_corpus_alone_has_no_traces_to_normalise() -> None:
    entry = {"method": "wanda", "sparsity": 0.5, "domain": "legal", "alpha": [0, 0.5, 1]}
    plain, normalised = (expand({**entry, "trace_normalised": on}) for on in (False, True))
    assert [one.key == other.key for one, other in zip(plain, normalised, strict=True)] == [True, False, True]
    assert [variant.trace_normalised for variant in normalised] == [False, True, False]


def test_seeds_repeat_what_depends_on_data() -> None:
    found = expand({"method": "wanda", "sparsity": 0.5}, {"method": "rtn", "bits": 4}, calibration={"seed": [0, 3]})
    assert [(variant.name, variant.seed) for variant in found] == [
        ("wanda-50-general-s0", 0),
        ("wanda-50-general-s3", 3),
        ("rtn-w4g128", 0),
    ]


def test_only_corpora_of_some_mixture_are_sampled() -> None:
    plan = {"model": "m", "corpora": CORPORA, "calibration": {"seed": [0, 1]}}
    entry = {"method": "wanda", "sparsity": 0.5, "domain": "legal", "alpha": 1}
    assert samples_needed(parse_plan({**plan, "compress": [entry]})) == [("legal", 0), ("legal", 1)]
    free = {"method": "rtn", "bits": 4}
    assert samples_needed(parse_plan({**plan, "compress": [free]})) == [("general", 0)]
    assert samples_needed(parse_plan(plan)) == []


def test_steps_are_swept_one_by_one_and_together() -> None:
    entry = {
        "domain": ["legal", "biomedical"],
        "alpha": [0.5],
        "steps": [
            {"method": "alps", "sparsity": [0.6, 0.7]},
            {"method": "refit", "iterations": [10, None]},
            {"method": "gptq", "bits": 4, "group_size": 32},
            {"method": "eora", "rank": [0], "alpha": [0.5, 1]},
        ],
    }
    found = expand(entry)
    assert len(found) == len({variant.key for variant in found}) == 2 * 2 * 2 * 2
    first = found[0]
    assert first.name == "alps-60-refit-gptq-w4g32-eora-rank0-on-legal-a0.5-legal-a0.5"
    assert first.method == "alps+refit+gptq+eora"
    assert first.setting["sparsity"] == 0.6
    assert first.setting["iterations"] == 300
    assert first.setting["refit.iterations"] == 10
    assert first.setting["eora.mixture"] == {"general": 0.5, "legal": 0.5}
    assert first.grid == (4, 32)
    own = [variant.recipe[3].mixture.as_dict() for variant in found]
    assert {"biomedical": 1.0} in own
    assert {"general": 0.5, "biomedical": 0.5} in own
    assert first.mixture is not None
    assert first.mixture.as_dict() == {"general": 0.5, "legal": 0.5}
    assert samples_needed(parse_plan({"model": "m", "corpora": CORPORA, "compress": [entry]})) == [
        ("general", 0),
        ("legal", 0),
        ("biomedical", 0),
    ]


def test_a_plan_with_steps_reads_back_equal() -> None:
    entry = {"steps": [{"method": "wanda", "sparsity": 0.5}, {"method": "refit"}]}
    plan = parse_plan({"model": "m", "corpora": CORPORA, "compress": [entry]})
    refit = {"method": ["refit"], "iterations": [10], "damping": [0.0]}
    assert yaml.safe_load(dump_plan(plan))["compress"][0]["steps"][1] == refit
    assert parse_plan(yaml.safe_load(dump_plan(plan))) == plan


def test_the_version_of_a_method_is_part_of_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"steps": [{"method": "wanda", "sparsity": 0.5}, {"method": "refit"}]}
    [variant] = expand(entry)
    before = variant.key
    monkeypatch.setattr(COMPRESSORS["refit"], "version", 99)
    [after] = expand(entry)
    assert variant.name == after.name
    assert before != after.key


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"method": "sparsegtp", "sparsity": 0.5}, r"compress\.0\.method: unknown method.*sparsegpt"),
        ({"method": "wanda"}, "needs `sparsity`"),
        ({"method": "wanda", "sparsity": 0.5, "bits": 4}, "has no `bits`"),
        ({"method": "gptq", "bits": 9}, r"compress\.0: bits must be 2 to 8 \(got 9\)"),
        ({"method": "wanda", "sparsity": 124}, r'compress\.0: not a sparsity .*in quotes, such as "2:4"'),
        ({"method": "wanda", "sparsity": "5:4"}, "not a sparsity"),
        ({"method": "wanda", "sparsity": 0.5, "mixture": {"general": 0.5}}, r"compress\.0: .*sum to 1"),
        ({"method": "wanda", "sparsty": 0.5}, r"compress\.0\.sparsty: unknown field; did you mean `sparsity`"),
        ({"method": "gptq", "bits": "four"}, r"compress\.0\.bits: .*integer.*got 'four'"),
        ({"method": "refit"}, "the result of an earlier step"),
        ({"steps": [{"method": "eora"}]}, "the result of an earlier step"),
        ({"steps": [{"method": "wanda", "sparsity": 0.5}, {"rank": 3}]}, r"steps\.1: a step is a mapping"),
        ({"steps": [{"method": "wanda", "sparsity": 0.5}], "bits": 4}, "stands in its step"),
        ({"steps": [{"method": "wanda", "sparsity": 0.5}], "method": "gptq"}, "not beside `steps`"),
        ({"steps": [{"method": "wanda", "sparsity": 0.5}, {"method": "eora", "rnk": 3}]}, r"steps\.1\.rnk.*`rank`"),
        ({"steps": [{"method": "wanda", "sparsity": 0.5}, {"method": "eora", "domain": "law"}]}, "no corpus 'law'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(entry: dict, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        expand(entry)


def test_a_variant_says_whether_it_has_a_low_rank_part() -> None:
    steps = [{"method": "wanda", "sparsity": 0.5}, {"method": "eora", "rank": [0, 1]}]
    found = expand({"steps": steps}, {"method": "3basil", "sparsity": 0.5}, {"method": "wanda", "sparsity": 0.5})
    assert [any_step(variant.steps, "has_low_rank") for variant in found] == [False, True, True, False]


def test_a_domain_mixed_with_a_general_corpus_needs_one() -> None:
    with pytest.raises(PlanError, match="a corpus named `general`"):
        expand({"method": "wanda", "sparsity": 0.5, "domain": "legal"}, corpora={"legal": None})
