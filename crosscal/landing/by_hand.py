"""Documents that a user ingests manually and announces: the ledger treats their sources like landed files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from crosscal.corpora import IngestReport
from crosscal.corpora.sources import HubDataset, resolve
from crosscal.landing.items import LandedFile
from crosscal.landing.ledger import Ledger
from crosscal.landing.records import state
from crosscal.store import Store, digest_file, digest_of


def record_ingest(store: Store, sources: Sequence[str], report: IngestReport, revision: str | None = None) -> None:
    """Record the sources of an ingest and request a recompression, even if earlier attempts failed."""
    ledger, domain, version = Ledger(store), report.corpus.name, report.corpus.version
    for source in resolve(sources, revision):
        if isinstance(source, HubDataset):
            file, sha256 = LandedFile(domain, source.name, 0, None), digest_of([source.name, source.config])
        else:
            found = source.path.stat()
            file = LandedFile(domain, PurePosixPath(source.name).name, found.st_size, found.st_mtime)
            sha256 = digest_file(source.path)
        ledger.record(file, sha256, state("landed"))
        ledger.record(file, sha256, state("ingested", version=version))
    ledger.request(domain, version, again=True)
