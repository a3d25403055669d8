"""Documents chosen from a large pool: like a small sample of a domain, and no two of them nearly alike."""

from crosscal.selection.choosing import Selection, select
from crosscal.selection.settings import SelectionSettings

__all__ = ["Selection", "SelectionSettings", "select"]
