"""Moments on disk: Arrow IPC, the upper triangle of the Gram matrix as byte planes, each compressed with zstd.

A lossless file of about 0.41 of the full matrix (`crosscal.store.triangle` says how). `gram.arrow` has one uint8 column
per byte plane, most significant last; `vectors.arrow` has `abs_sum`, `sum` and the diagonal's `exponent`; inputs,
tokens and dtype stand in the schema metadata.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, P bytes a number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch
from torch import Tensor

from crosscal.errors import CorruptArtifact, NotFinite
from crosscal.statistics.finite import all_finite
from crosscal.statistics.moments import InputMoments
from crosscal.store.arrays import array_of
from crosscal.store.artifacts import Artifact, Store
from crosscal.store.triangle import pack_triangle, unpack_triangle

BATCH_ENTRIES = 1 << 21  # triangle entries per record batch: bounds the memory of writing and reading
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def write_moments(folder: Path, moments: InputMoments) -> None:
    """Write `gram.arrow` and `vectors.arrow` into a folder. Raises `NotFinite`: what is stored can be solved from."""
    if not all(all_finite(part) for part in (moments.gram_II, moments.abs_sum_I, moments.sum_I)):
        raise NotFinite("moments that are not finite are not stored", do="Calibrate in float32 or bfloat16.")
    gram_II = moments.gram_II.numpy()
    planes_PN, exponent_I = pack_triangle(gram_II)
    metadata = {"inputs": str(moments.inputs), "tokens": str(moments.tokens), "dtype": str(gram_II.dtype)}
    if moments.weighted_tokens is not None:
        metadata["weighted_tokens"] = repr(moments.weighted_tokens)
    schema = _schema(len(planes_PN)).with_metadata(metadata)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    with pa.ipc.new_file(str(folder / "gram.arrow"), schema, options=options) as writer:
        for start in range(0, planes_PN.shape[1], BATCH_ENTRIES):
            part_PN = planes_PN[:, start : start + BATCH_ENTRIES]
            writer.write_batch(pa.record_batch([array_of(plane_N) for plane_N in part_PN], schema=schema))
    vectors = {"abs_sum": moments.abs_sum_I.numpy(), "sum": moments.sum_I.numpy(), "exponent": exponent_I}
    table = pa.table({name: array_of(vector_I) for name, vector_I in vectors.items()})
    with pa.ipc.new_file(str(folder / "vectors.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)


def read_moments(store: Store, artifact: Artifact) -> InputMoments:
    """Read moments back, bit for bit. Raises `CorruptArtifact`."""
    gram, vectors = store.path(artifact, "gram.arrow"), store.path(artifact, "vectors.arrow")
    try:
        exponent_I, abs_sum_I, sum_I = _read_vectors(vectors)
        gram_II, tokens, weighted_tokens = _read_gram(gram, exponent_I)
        for vector_I in (abs_sum_I, sum_I):
            if len(vector_I) != len(gram_II) or vector_I.dtype != gram_II.dtype:
                raise ValueError(f"{len(vector_I)} {vector_I.dtype} sums for {len(gram_II)} inputs")
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise CorruptArtifact(
            "stored moments cannot be read",
            where=f"{artifact.kind}/{artifact.key[:12]}",
            got=str(error)[:200],
            do="Remove this artifact; the same command then makes it anew.",
        ) from error
    return InputMoments(gram_II, abs_sum_I, sum_I, tokens, weighted_tokens)


def _schema(planes: int) -> pa.Schema:
    return pa.schema([(f"byte{plane}", pa.uint8()) for plane in range(planes)])


def _read_vectors(path: Path) -> tuple[np.ndarray | None, Tensor, Tensor]:
    """(exponent_I, abs_sum_I, sum_I); the first version of the store had no exponents."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        abs_sum_I, sum_I = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("abs_sum", "sum"))
        exponent_I = table["exponent"].to_numpy().copy() if "exponent" in table.column_names else None
    return exponent_I, abs_sum_I, sum_I


def _read_gram(path: Path, exponent_I: np.ndarray | None) -> tuple[Tensor, int, float | None]:
    """The full matrix, its tokens, and the sum of their weights where they have any."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        metadata = reader.schema.metadata or {}
        inputs, tokens = int(metadata[b"inputs"]), int(metadata[b"tokens"])
        weighted_tokens = float(metadata[b"weighted_tokens"]) if b"weighted_tokens" in metadata else None
        dtype = _DTYPES[metadata[b"dtype"].decode()]
        entries = inputs * (inputs + 1) // 2
        # Before any memory is asked for: a header cannot claim more than the file has batches for.
        if inputs < 1 or tokens < 0 or entries > reader.num_record_batches * BATCH_ENTRIES:
            raise ValueError(f"{inputs} inputs, {tokens} tokens in {reader.num_record_batches} batches")
        if not reader.schema.equals(_schema(dtype.itemsize)):
            raise ValueError(f"columns {reader.schema.names} for {dtype}")
        if exponent_I is not None and (len(exponent_I) != inputs or exponent_I.dtype != np.uint16):
            raise ValueError(f"{len(exponent_I)} {exponent_I.dtype} exponents for {inputs} inputs")
        planes_PN = _read_planes(reader, entries, dtype.itemsize)
    return torch.from_numpy(unpack_triangle(planes_PN, exponent_I, inputs)), tokens, weighted_tokens


def _read_planes(reader: pa.ipc.RecordBatchFileReader, entries: int, planes: int) -> np.ndarray:
    planes_PN = np.empty((planes, entries), dtype=np.uint8)
    position = 0
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        for plane, column in enumerate(batch.columns):
            planes_PN[plane, position : position + batch.num_rows] = column.to_numpy()
        position += batch.num_rows
    if position != entries:
        raise ValueError(f"{position} entries instead of {entries}")
    return planes_PN
