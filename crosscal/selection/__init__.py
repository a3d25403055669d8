"""Data selection: choose documents from a large pool that resemble a small domain sample, without near-duplicates."""

from crosscal.selection.choosing import Selection, select
from crosscal.selection.settings import SelectionSettings

__all__ = ["Selection", "SelectionSettings", "select"]
