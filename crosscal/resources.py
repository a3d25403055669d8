"""Files shipped with crosscal besides its code: plans, the embedded demo, the deployment file.

`plans`, `data`, `flows`, `tasks` and `deployment.yaml` lie at the top of the checkout; in `crosscal/` they are symbolic
links, so that a wheel contains them as folders of the package and installs no top-level packages `flows` or `tasks`.
"""

from __future__ import annotations

from pathlib import Path

ROOT = (Path(__file__).parent / "plans").resolve().parent
"""The checkout, or the package's own folder if a wheel is installed."""

DEMO_PLAN = ROOT / "plans" / "demo.yaml"
SERVICE_FILE = ROOT / "plans" / "service.yaml"


def plan_file(path: Path) -> Path:
    """Return a plan's path. Plans shipped with crosscal are found by name (`plans/landing.yaml`) from any folder."""
    return path if path.is_absolute() or path.is_file() or not (ROOT / path).is_file() else ROOT / path
