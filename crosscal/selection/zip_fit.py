"""ZIP-FIT: documents that compress well together with those of a sample.

Obbad et al.: "ZIP-FIT: embedding-free data selection via compression-based alignment",
https://arxiv.org/abs/2410.18194, algorithm 1. The compressor is the paper's, gzip: it is in the standard library,
releases the GIL, and can compress many continuations of one text without compressing that text again
(`crosscal.files.sizes`). lz4, the default of the published code, cannot.
"""

from __future__ import annotations

# Shapes: N documents, T documents of the sample.
from collections.abc import Sequence
from functools import partial

import numpy as np

from crosscal.files.sizes import compressed_bytes_with
from crosscal.lanes import each_side_by_side
from crosscal.progress import Report
from crosscal.selection.texts import DocumentTexts

MOST_BYTES = 2**12
"""Length of the beginning of a document that is compared. The paper's texts are short and compared whole; for long ones
the distance mostly measures the difference in length, and gzip's window is 2¹⁵ bytes (`benchmarks/choosing.py`)."""


def zip_fit_scores(pool: DocumentTexts, targets: Sequence[str], report: Report) -> np.ndarray:
    """Return the alignment of each of the pool's documents with the targets: float64 [N].

    It is the mean over the targets t of 1 - NCD(d, t), NCD(d, t) = (C(d t) - min(C(d), C(t))) / max(C(d), C(t)), where
    C is the gzip-compressed length in bytes. This takes N · T compressions; batches of documents run in parallel.
    """
    beginnings = [_beginning(text) for text in targets]
    size_T = np.array([compressed_bytes_with(target, [b""])[0] for target in beginnings])
    jobs = [partial(_alignments, pool, number, beginnings, size_T) for number in range(len(pool.batches))]
    found: list[np.ndarray] = []
    done = 0
    for alignment_B in each_side_by_side(jobs):
        found.append(alignment_B)
        done += len(alignment_B)
        report("compressing the pool", done, len(pool))
    return np.concatenate(found)


def _alignments(pool: DocumentTexts, number: int, targets: Sequence[bytes], size_T: np.ndarray) -> np.ndarray:
    return np.array([_alignment(_beginning(text), targets, size_T) for text in pool.batch(number)])


def _alignment(document: bytes, targets: Sequence[bytes], size_T: np.ndarray) -> float:
    size, *sizes = compressed_bytes_with(document, [b"", *targets])
    distance_T = (np.array(sizes) - np.minimum(size, size_T)) / np.maximum(size, size_T)
    return float(np.mean(1 - distance_T))


def _beginning(text: str) -> bytes:
    return text[:MOST_BYTES].encode()[:MOST_BYTES]
