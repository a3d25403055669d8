"""Content-addressed artifacts on disk or in object storage: existing means complete."""

from crosscal.store.artifacts import Artifact, Store
from crosscal.store.keys import digest_file, digest_of

__all__ = ["Artifact", "Store", "digest_file", "digest_of"]
