"""A wheel contains the package `crosscal` and nothing else at the top level, with its flows, plans and demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.wheel import install_wheel, python


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def test_nothing_but_crosscal_lies_at_the_top(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"crosscal"}


def test_a_wheel_outside_a_checkout_has_demo_plans_and_deployments(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("raise SystemExit('a file of the user, not of crosscal')")
    (tmp_path / "flows.py").write_text("raise SystemExit('a file of the user, not of crosscal')")
    check = """
from crosscal.cli import main
from crosscal.resources import DEMO_PLAN, ROOT
import crosscal.flows.drive
assert crosscal.__file__.startswith(sys.path[0]), crosscal.__file__
assert (ROOT / "deployment.yaml").is_file() and (ROOT / "flows" / "watch.py").is_file()
sys.path.insert(1, "")
sys.argv = ["crosscal", "plan", "check", str(DEMO_PLAN)]
main()
"""
    assert "problems" in python(check, cwd=tmp_path, path=installed)


def test_a_users_own_tasks_and_flows_are_not_in_the_way(tmp_path: Path) -> None:
    for name in ("tasks.py", "flows.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the user, not of crosscal')")
    assert "Usage" in python("-m", "crosscal", "run", "--help", cwd=tmp_path)
    python("-c", "import crosscal.flows.drive", cwd=tmp_path)
