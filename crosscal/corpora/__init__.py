"""Documents: read from files or the hub, deduplicated, split by document, versioned by content."""

from crosscal.corpora.corpus import Corpus, Shard, documents, load_corpus
from crosscal.corpora.ingest import IngestReport, ingest
from crosscal.corpora.limits import DocumentLimits

__all__ = ["Corpus", "DocumentLimits", "IngestReport", "Shard", "documents", "ingest", "load_corpus"]
