"""Files that come with crosscal beside its code: plans, the embedded demo, the deployment file.

`plans`, `data`, `flows`, `tasks` and `deployment.yaml` lie at the top of the checkout; in `crosscal/` they are symbolic
links, so that a wheel holds them as folders of the package, and no environment gets top-level packages called `flows`
or `tasks`.
"""

from __future__ import annotations

from pathlib import Path

ROOT = (Path(__file__).parent / "plans").resolve().parent
"""The checkout; where a wheel is installed, the package's own folder."""

DEMO_PLAN = ROOT / "plans" / "demo.yaml"
SERVICE_FILE = ROOT / "plans" / "service.yaml"


def plan_file(path: Path) -> Path:
    """A plan's file; one that comes with crosscal is found by its name, `plans/landing.yaml`, from any folder."""
    return path if path.is_absolute() or path.is_file() or not (ROOT / path).is_file() else ROOT / path
