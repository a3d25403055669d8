"""Moments on disk: Arrow IPC, the upper triangle of the Gram matrix as byte planes, each compressed with zstd.

A lossless file of about 0.41 of the full matrix (`crosscal.store.triangle` says how). `gram.arrow` has one uint8 column
per byte plane, most significant last; `vectors.arrow` has a column for every other sum that the artifact holds, and the
diagonal's `exponent` beside a matrix; inputs, tokens and dtype stand in the schema metadata.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, P bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch
from torch import Tensor

from crosscal.errors import CorruptArtifact, NotFinite
from crosscal.statistics.finite import all_finite
from crosscal.statistics.moments import InputMoments
from crosscal.statistics.statistic import Statistic
from crosscal.store.arrays import array_of, arrow_file
from crosscal.store.artifacts import Artifact, Store
from crosscal.store.triangle import pack_triangle, unpack_triangle

BATCH_ENTRIES = 1 << 21  # triangle entries per record batch: bounds the memory of writing and reading
GRAM, VECTORS = "gram.arrow", "vectors.arrow"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def write_moments(folder: Path, moments: InputMoments) -> None:
    """Write the sums that there are into a folder, matrices as `gram.arrow`. Raises `NotFinite`: what is stored can be
    solved from."""
    if not all(map(all_finite, moments.sums.values())):
        raise NotFinite("moments that are not finite are not stored", do="Calibrate in float32 or bfloat16.")
    vectors = {which.value: each.numpy() for which, each in moments.sums.items() if not which.is_matrix}
    numbers = next(iter(moments.sums.values())).numpy()
    metadata = {"inputs": str(moments.inputs), "tokens": str(moments.tokens), "dtype": str(numbers.dtype)}
    if moments.weighted_tokens is not None:
        metadata["weighted_tokens"] = repr(moments.weighted_tokens)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    if Statistic.GRAM in moments.sums:
        planes_PN, vectors["exponent"] = pack_triangle(moments.gram_II.numpy())
        schema = _schema(len(planes_PN)).with_metadata(metadata)
        with arrow_file(folder / GRAM, schema, options) as writer:
            for start in range(0, planes_PN.shape[1], BATCH_ENTRIES):
                part_PN = planes_PN[:, start : start + BATCH_ENTRIES]
                writer.write_batch(pa.record_batch([array_of(plane_N) for plane_N in part_PN], schema=schema))
    table = pa.table({name: array_of(vector_I) for name, vector_I in vectors.items()})
    with arrow_file(folder / VECTORS, table.schema.with_metadata(metadata), options) as writer:
        writer.write_table(table.replace_schema_metadata(metadata))


def read_moments(store: Store, artifact: Artifact) -> InputMoments:
    """Read moments back, bit for bit: the sums that an artifact holds. Raises `CorruptArtifact`."""
    files = {name: store.path(artifact, name) for name in (GRAM, VECTORS) if name in artifact.files}
    try:
        sums, exponent_I, header = _read_vectors(files[VECTORS])
        if GRAM in files:
            gram_II, header = _read_gram(files[GRAM], exponent_I)
            sums = {Statistic.GRAM: gram_II, **sums}
        if header is None or not sums:
            raise ValueError("no header or no sums")
        for sum_ in sums.values():
            if len(sum_) != header.inputs or sum_.dtype != header.dtype:
                raise ValueError(f"{len(sum_)} {sum_.dtype} sums for {header.inputs} inputs")
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise CorruptArtifact(
            "stored moments cannot be read",
            where=f"{artifact.kind}/{artifact.key[:12]}",
            got=str(error)[:200],
            do="Remove this artifact; the same command then makes it anew.",
        ) from error
    return InputMoments(sums, header.tokens, header.weighted_tokens)


@dataclass(frozen=True)
class _Header:
    """What the metadata of a schema say. Raises `KeyError`, `ValueError`."""

    inputs: int
    tokens: int
    dtype: torch.dtype
    weighted_tokens: float | None

    @classmethod
    def of(cls, schema: pa.Schema) -> _Header:
        said = schema.metadata or {}
        inputs, tokens, dtype = int(said[b"inputs"]), int(said[b"tokens"]), _DTYPES[said[b"dtype"].decode()]
        if inputs < 1 or tokens < 0:
            raise ValueError(f"{inputs} inputs, {tokens} tokens")
        weighted_tokens = float(said[b"weighted_tokens"]) if b"weighted_tokens" in said else None
        return cls(inputs, tokens, dtype, weighted_tokens)


def _schema(planes: int) -> pa.Schema:
    return pa.schema([(f"byte{plane}", pa.uint8()) for plane in range(planes)])


def _read_vectors(path: Path) -> tuple[dict[Statistic, Tensor], np.ndarray | None, _Header | None]:
    """(sums, exponent_I, header); the first version of the store had no exponents, and the header in `gram.arrow`."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        copied = {name: table[name].to_numpy().copy() for name in table.column_names}
        header = _Header.of(table.schema) if table.schema.metadata else None
    exponent_I = copied.pop("exponent", None)
    return {Statistic(name): torch.from_numpy(vector_I) for name, vector_I in copied.items()}, exponent_I, header


def _read_gram(path: Path, exponent_I: np.ndarray | None) -> tuple[Tensor, _Header]:
    """The full matrix, and what its file says of it."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        header = _Header.of(reader.schema)
        entries = header.inputs * (header.inputs + 1) // 2
        # Before any memory is asked for: a header cannot claim more than the file has batches for.
        if entries > reader.num_record_batches * BATCH_ENTRIES:
            raise ValueError(f"{header.inputs} inputs in {reader.num_record_batches} batches")
        if not reader.schema.equals(_schema(header.dtype.itemsize)):
            raise ValueError(f"columns {reader.schema.names} for {header.dtype}")
        if exponent_I is not None and (len(exponent_I) != header.inputs or exponent_I.dtype != np.uint16):
            raise ValueError(f"{len(exponent_I)} {exponent_I.dtype} exponents for {header.inputs} inputs")
        planes_PN = _read_planes(reader, entries, header.dtype.itemsize)
    return torch.from_numpy(unpack_triangle(planes_PN, exponent_I, header.inputs)), header


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
