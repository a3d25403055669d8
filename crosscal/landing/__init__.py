"""From a landing place to the store: complete files, the ledger of what became of each, and pending domains."""

from crosscal.landing.intake import Landed, take_in
from crosscal.landing.items import LandedFile, Refusal
from crosscal.landing.ledger import Ledger
from crosscal.landing.picture import Entry
from crosscal.landing.place import complete_files
from crosscal.landing.runs import Run

__all__ = ["Entry", "Landed", "LandedFile", "Ledger", "Refusal", "Run", "complete_files", "take_in"]
