"""From a landing place to the store: complete files, the ledger of what became of each, and pending domains."""

from crosscal.landing.intake import LandingResult, take_in
from crosscal.landing.items import LandedFile, Refusal
from crosscal.landing.ledger import Ledger
from crosscal.landing.ledger_view import LedgerEntry
from crosscal.landing.place import complete_files
from crosscal.landing.runs import Run

__all__ = ["LandedFile", "LandingResult", "Ledger", "LedgerEntry", "Refusal", "Run", "complete_files", "take_in"]
