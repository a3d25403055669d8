"""What a wheel holds: the package `crosscal` and nothing else at the top, with its flows, plans and demo."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "deployment.yaml")
LEFT_OUT = ("__pycache__", "*.egg-info")


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    command = [sys.executable, "-P", "-c", code + arguments[0]] if path else [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked: what `pip install` would lay in an environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("crosscal", "flows", "tasks", "plans", "data"):
        from_links = {"symlinks": True} if name == "crosscal" else {}
        copytree(ROOT / name, source / name, ignore=lambda _, names: [n for n in names if n in LEFT_OUT], **from_links)
    for name in BUILT_FROM:
        (source / name).write_bytes((ROOT / name).read_bytes())
    python(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", str(folder), str(source)),
        cwd=folder,
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


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
