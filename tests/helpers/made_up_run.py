"""Run directories with made-up numbers, as input of reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from crosscal.compressors import Sparsity, amounts_of
from crosscal.report import LayerRow, ResultRow, WindowRow, write_rows

DENSE = {"general": 80.0, "biomedical": 50.0, "legal": 25.0, "wikitext2": 200.0}


def result(variant: str = "dense", **changes: Any) -> ResultRow:
    """Return a result row: a perplexity of the dense model, with `changes` to its fields."""
    fields: dict[str, Any] = {
        "variant": variant,
        "method": "dense",
        "setting": {},
        "upstream": "dense",
        "mixture": {},
        "corpus_or_task": "general",
        "split": "test",
        "metric": "perplexity",
        "value": 80.0,
        "stderr": 2.0,
        "tokens": 1000,
        "seed": None,
        "model": "models/tiny",
        "device": "cpu",
        "seconds": 1.0,
    }
    found = {**fields, **changes}
    return ResultRow(**{"amounts": amounts(found["setting"]), **found})


def amounts(setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the `amounts` rows that a method with these settings reports."""
    step = SimpleNamespace(kind="quantize" if "bits" in setting else "prune", **setting)
    if "sparsity" in setting:
        step.sparsity = Sparsity.parse(setting["sparsity"])
    step.group_size = setting.get("group_size")
    return [amount.as_row() for amount in amounts_of(step)]


def layer(variant: str, block: int | None, matrix: str, **changes: Any) -> LayerRow:
    """Return the row of one solved matrix, with `changes` to its fields."""
    fields: dict[str, Any] = {
        "layer": f"model.layers.{block}.{matrix}" if block is not None else matrix,
        "site": "mlp.in",
        "method": "sparsegpt",
        "setting": {"sparsity": 0.5},
        "loss": 3.0,
        "relative_loss": 0.03,
        "heldout_relative_loss": 0.04,
        "sparsity": 0.5,
        "bits": None,
        "damping": 0.01,
        "dead_inputs": 0,
        "tokens": 32768,
        "seconds": 0.1,
        "parameters": 1000,
    }
    return LayerRow(variant=variant, block=block, **{**fields, **changes})


def sweep(
    *,
    corpora: Sequence[str] = ("general", "biomedical"),
    settings: Sequence[tuple[str, dict[str, Any]]] = (("sparsegpt", {"sparsity": 0.5}), ("gptq", {"bits": 4})),
    alphas: Sequence[float] = (0.0, 0.5, 1.0),
    domain: str = "biomedical",
    seeds: Sequence[int] = (0,),
) -> list[ResultRow]:
    """Return rows of a dense model and of one variant per setting, alpha and seed; both splits have equal values."""
    rows = [result(corpus_or_task=corpus, value=DENSE.get(corpus, 90.0)) for corpus in corpora]
    for number, (method, setting) in enumerate(settings):
        for alpha in alphas:
            mixture = {name: weight for name, weight in (("general", 1 - alpha), (domain, alpha)) if weight}
            for seed in seeds:
                name = f"{method}{number}-{domain}-a{alpha:g}" + (f"-s{seed}" if len(seeds) > 1 else "")
                for corpus in corpora:
                    worse = 1 + 0.1 * (number + 1) + (0.05 * alpha if corpus == "general" else 0.05 * (1 - alpha))
                    rows.append(
                        result(
                            name,
                            method=method,
                            setting=setting,
                            mixture=mixture,
                            corpus_or_task=corpus,
                            value=DENSE.get(corpus, 90.0) * worse + 0.1 * seed,
                            seed=seed,
                        )
                    )
    return on_both_splits(rows)


def on_both_splits(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return the rows, followed by a validation row with the same value for each perplexity."""
    return [*rows, *(replace(row, split="validation") for row in rows if row.metric == "perplexity")]


def kept_dense(variant: str, block: int | None, matrix: str, **changes: Any) -> LayerRow:
    """Return the row of a matrix left dense by a fallback, with `changes` to its fields."""
    nothing = {"loss": 0.0, "relative_loss": 0.0, "heldout_relative_loss": None, "sparsity": 0.0, "tokens": 0}
    return layer(variant, block, matrix, **{**nothing, "fallback": "keep-dense: not positive definite", **changes})


def windows_of(results: Sequence[ResultRow], count: int = 16, noise: float = 0.001) -> list[WindowRow]:
    """Return the negative log-likelihoods per window for each perplexity: a difficulty that all variants share plus
    noise per variant, with a mean of exactly log(value)."""
    rows = []
    for row in (row for row in results if row.metric == "perplexity" and row.value is not None):
        shared = random.Random(row.corpus_or_task)
        own = random.Random(f"{row.variant} {row.corpus_or_task}")
        around = [shared.gauss(0, 0.3) + own.gauss(0, noise) for _ in range(count)]
        mean = math.log(row.value or 1.0) - math.fsum(around) / count
        rows.append(WindowRow(row.variant, row.corpus_or_task, row.split, [mean + nll for nll in around]))
    return rows


def write_run(
    folder: Path,
    results: Sequence[ResultRow],
    layers: Sequence[LayerRow] = (),
    windows: Sequence[WindowRow] = (),
    models: Sequence[str] = (),
    **run: Any,
) -> Path:
    """Write the given files and no others; return the folder."""
    write_rows(folder / "results.jsonl", results)
    if windows:
        write_rows(folder / "windows.jsonl", windows)
    for name in models:
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text("{}", encoding="utf-8")
    if layers:
        write_rows(folder / "layers.jsonl", layers)
    if run:
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return folder
