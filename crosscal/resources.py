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
