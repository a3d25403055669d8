"""Command line help, version and public names; heavy packages are imported only when they are used."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import crosscal as package

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "prefect",
    "pyarrow",
    "matplotlib",
    "lm_eval",
    "pydantic",
    "numpy",
    "yaml",
)


def commands_of(group: Any, *names: str) -> Iterator[tuple[str, ...]]:
    """Every command of the command line, as its words."""
    for name, command in group.commands.items():
        yield from commands_of(command, *names, name) if hasattr(command, "commands") else [(*names, name)]


@pytest.mark.parametrize(
    "code", ["import crosscal", "import typer.main, crosscal.cli as c; typer.main.get_command(c.app)"]
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    look = f"{code}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_command_explains_itself() -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    from crosscal.cli import app

    commands = list(commands_of(get_command(app)))
    assert len(commands) >= 20
    shown = CliRunner().invoke(app, ["--help"]).output
    for words in commands:
        done = CliRunner().invoke(app, [*words, "--help"])
        assert done.exit_code == 0
        assert f"{' '.join(words)} [OPTIONS]" in done.output, words
        assert re.search(rf"│ {words[0]} +\w", shown), words


def test_the_version_is_that_of_the_distribution() -> None:
    assert package.__version__ == importlib.metadata.version("crosscal")


def test_every_public_name_can_be_had_and_no_other() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    assert sorted(package._HOME) == sorted(package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense


def test_type_checkers_see_the_names_that_are_there() -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: str(node.module) for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {name: f"crosscal.{home}" for name, home in package._HOME.items()}


def test_the_example_of_the_readme_in_three_lines() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator)
    input_TI = torch.randn(64, 16, generator=generator)
    hessian = input_TI.T @ input_TI / 64

    from crosscal import COMPRESSORS, LayerProblem

    problem = LayerProblem(name="toy", weight_OI=weight, hessian_II=hessian)
    solution = COMPRESSORS["sparsegpt"](sparsity=0.5).compress(problem)

    error = weight - solution.weight_OI
    assert int((solution.weight_OI == 0).sum()) == weight.numel() // 2
    assert solution.loss == pytest.approx(float(torch.trace(error @ hessian @ error.T)), rel=1e-5)
