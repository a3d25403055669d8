"""The wheel, built from a copy of the sources and unpacked: what `pip install` would put into an environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "deployment.yaml")
LEFT_OUT = ignore_patterns("__pycache__", "*.egg-info")


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Return Python's output for these arguments, or with `path` for a piece of code that imports from there first."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    command = [sys.executable, "-P", "-c", code + arguments[0]] if path else [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install_wheel(folder: Path) -> Path:
    """Build and unpack the wheel under `folder`; return the folder with the unpacked files."""
    source = folder / "source"
    for name in ("crosscal", "flows", "tasks", "plans", "data"):
        from_links = {"symlinks": True} if name == "crosscal" else {}
        copytree(ROOT / name, source / name, ignore=LEFT_OUT, **from_links)
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
