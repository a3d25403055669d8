"""Moments on disk: Arrow IPC, the upper triangle of a Gram matrix as byte planes, each compressed with zstd.

The file is lossless and about 0.41 of the full matrix's size (see `crosscal.store.triangle`). `gram.arrow` has one
uint8 column per byte plane, most significant last. `vectors.arrow` has a column for every other sum of the artifact,
and the diagonal's `exponent` for each matrix. The schema metadata contain inputs, tokens and dtype. Every matrix has a
file of its name. A matrix that is not symmetric is stored as two triangles: its own, then that of its transpose.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, P bytes per number.
"""

from __future__ import annotations

from collections.abc import Iterator
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
VECTORS = "vectors.arrow"
MATRICES = {which: f"{which}.arrow" for which in Statistic if which.is_matrix}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def write_moments(folder: Path, moments: InputMoments) -> None:
    """Write the sums that `moments` holds into a folder. Raises `NotFinite` for sums that cannot be solved from."""
    if not all(map(all_finite, moments.sums.values())):
        raise NotFinite("moments that are not finite are not stored", do="Calibrate in float32 or bfloat16.")
    vectors = {which.value: each.numpy() for which, each in moments.sums.items() if not which.is_matrix}
    numbers = next(iter(moments.sums.values())).numpy()
    metadata = {"inputs": str(moments.inputs), "tokens": str(moments.tokens), "dtype": str(numbers.dtype)}
    if moments.weighted_tokens is not None:
        metadata["weighted_tokens"] = repr(moments.weighted_tokens)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    for which in (each for each in MATRICES if each in moments.sums):
        matrix_II = moments.sums[which].numpy()
        schema = _schema(matrix_II.itemsize).with_metadata(metadata)
        with arrow_file(folder / MATRICES[which], schema, options) as writer:
            for triangle_II in [matrix_II] if which.is_symmetric else [matrix_II, np.ascontiguousarray(matrix_II.T)]:
                planes_PN, vectors[_exponent(which)] = pack_triangle(triangle_II)
                _write_planes(writer, planes_PN)
    table = pa.table({name: array_of(vector_I) for name, vector_I in vectors.items()})
    with arrow_file(folder / VECTORS, table.schema.with_metadata(metadata), options) as writer:
        writer.write_table(table.replace_schema_metadata(metadata))


def read_moments(store: Store, artifact: Artifact) -> InputMoments:
    """Read the sums that an artifact holds, bit for bit as written. Raises `CorruptArtifact`."""
    held = {which: name for which, name in MATRICES.items() if name in artifact.files}
    files = {name: store.path(artifact, name) for name in (*held.values(), VECTORS) if name in artifact.files}
    try:
        vectors, exponents, header = _read_vectors(files[VECTORS])
        sums: dict[Statistic, Tensor] = {}
        for which, name in held.items():
            sums[which], header = _read_matrix(which, files[name], exponents.get(_exponent(which)))
        sums |= vectors
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
            do="Remove this artifact; the same command then recomputes it.",
        ) from error
    return InputMoments(sums, header.tokens, header.weighted_tokens)


@dataclass(frozen=True)
class _Header:
    """The metadata of a schema. `of` raises `KeyError`, `ValueError`."""

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


def _exponent(which: Statistic) -> str:
    """Column of a matrix's exponents. That of the Gram matrix has no prefix: it was once the only matrix."""
    return "exponent" if which is Statistic.GRAM else f"{which}_exponent"


def _write_planes(writer: pa.ipc.RecordBatchFileWriter, planes_PN: np.ndarray) -> None:
    for start in range(0, planes_PN.shape[1], BATCH_ENTRIES):
        part_PN = planes_PN[:, start : start + BATCH_ENTRIES]
        writer.write_batch(pa.record_batch([array_of(plane_N) for plane_N in part_PN], schema=_schema(len(planes_PN))))


def _schema(planes: int) -> pa.Schema:
    return pa.schema([(f"byte{plane}", pa.uint8()) for plane in range(planes)])


def _read_vectors(path: Path) -> tuple[dict[Statistic, Tensor], dict[str, np.ndarray], _Header | None]:
    """Return (sums, exponents by column, header). The first version of the store wrote no exponents, and the header
    only in `gram.arrow`."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        copied = {name: table[name].to_numpy().copy() for name in table.column_names}
        header = _Header.of(table.schema) if table.schema.metadata else None
    exponents = {name: copied.pop(name) for name in map(_exponent, MATRICES) if name in copied}
    return {Statistic(name): torch.from_numpy(vector_I) for name, vector_I in copied.items()}, exponents, header


def _read_matrix(which: Statistic, path: Path, exponent_I: np.ndarray | None) -> tuple[Tensor, _Header]:
    """Return the full matrix and the header of its file."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        header = _Header.of(reader.schema)
        triangle = header.inputs * (header.inputs + 1) // 2
        entries = triangle if which.is_symmetric else 2 * triangle
        # Before memory is allocated: the header must not claim more entries than the file's batches can contain.
        if entries > reader.num_record_batches * BATCH_ENTRIES:
            raise ValueError(f"{header.inputs} inputs in {reader.num_record_batches} batches")
        if not reader.schema.equals(_schema(header.dtype.itemsize)):
            raise ValueError(f"columns {reader.schema.names} for {header.dtype}")
        if exponent_I is not None and (len(exponent_I) != header.inputs or exponent_I.dtype != np.uint16):
            raise ValueError(f"{len(exponent_I)} {exponent_I.dtype} exponents for {header.inputs} inputs")
        batches = map(reader.get_batch, range(reader.num_record_batches))
        planes = (_read_planes(batches, triangle, header.dtype.itemsize) for _ in range(entries // triangle))
        matrix_II, *transposed = (unpack_triangle(planes_PN, exponent_I, header.inputs) for planes_PN in planes)
        if next(batches, None) is not None:
            raise ValueError(f"more than {entries} entries")
    for below_II in transposed:
        np.copyto(matrix_II, below_II, where=np.tri(header.inputs, k=-1, dtype=bool))
    return torch.from_numpy(matrix_II), header


def _read_planes(batches: Iterator[pa.RecordBatch], entries: int, planes: int) -> np.ndarray:
    """Read the next triangle, of `entries` entries. No batch contains parts of two triangles."""
    planes_PN = np.empty((planes, entries), dtype=np.uint8)
    position = 0
    while position < entries and (batch := next(batches, None)) is not None:
        for plane, column in enumerate(batch.columns):
            planes_PN[plane, position : position + batch.num_rows] = column.to_numpy()
        position += batch.num_rows
    if position != entries:
        raise ValueError(f"{position} entries instead of {entries}")
    return planes_PN
