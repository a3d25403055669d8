"""Moments on disk: Arrow IPC, the upper triangle of the Gram matrix as byte planes, each compressed with zstd.

The bytes of floating-point numbers compress when bytes of equal significance stand together (exponents next to
exponents): a lossless file of about 0.43 of the full matrix. `gram.arrow` has one uint8 column per byte plane, most
significant last; `vectors.arrow` has `abs_sum` and `sum`; inputs, tokens and dtype stand in the schema metadata.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, P bytes a number, B rows of a panel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch
from torch import Tensor

from crosscal.errors import CorruptArtifact, NotFinite
from crosscal.statistics.moments import InputMoments
from crosscal.store.artifacts import Artifact, Store

BATCH_ENTRIES = 1 << 21  # triangle entries per record batch: bounds the memory of writing and reading
PANEL_ROWS = 64  # mirrored at once: a block and its transpose fit the cache
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def write_moments(folder: Path, moments: InputMoments) -> None:
    """Write `gram.arrow` and `vectors.arrow` into a folder. Raises `NotFinite`: what is stored can be solved from."""
    triangle_N, abs_sum_I, sum_I = _pack_triangle(moments.gram_II), moments.abs_sum_I.numpy(), moments.sum_I.numpy()
    if not all(np.isfinite(extreme(part)) for part in (triangle_N, abs_sum_I, sum_I) for extreme in (np.min, np.max)):
        raise NotFinite("moments that are not finite are not stored", do="Calibrate in float32 or bfloat16.")
    metadata = {"inputs": str(moments.inputs), "tokens": str(moments.tokens), "dtype": str(triangle_N.dtype)}
    planes_NP = triangle_N.view(np.uint8).reshape(len(triangle_N), triangle_N.itemsize)
    schema = _schema(planes_NP.shape[1]).with_metadata(metadata)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    with pa.ipc.new_file(str(folder / "gram.arrow"), schema, options=options) as writer:
        for start in range(0, len(planes_NP), BATCH_ENTRIES):
            part_PN = np.ascontiguousarray(planes_NP[start : start + BATCH_ENTRIES].T)
            writer.write_batch(pa.record_batch([pa.array(plane_N) for plane_N in part_PN], schema=schema))
    vectors = pa.table({"abs_sum": abs_sum_I, "sum": sum_I})
    with pa.ipc.new_file(str(folder / "vectors.arrow"), vectors.schema, options=options) as writer:
        writer.write_table(vectors)


def read_moments(store: Store, artifact: Artifact) -> InputMoments:
    """Read moments back, bit for bit. Raises `CorruptArtifact`."""
    gram, vectors = store.path(artifact, "gram.arrow"), store.path(artifact, "vectors.arrow")
    try:
        gram_II, tokens = _read_gram(gram)
        abs_sum_I, sum_I = _read_vectors(vectors, gram_II)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise CorruptArtifact(
            "stored moments cannot be read",
            where=f"{artifact.kind}/{artifact.key[:12]}",
            got=str(error)[:200],
            do="Remove this artifact; the same command then makes it anew.",
        ) from error
    return InputMoments(gram_II, abs_sum_I, sum_I, tokens)


def _schema(planes: int) -> pa.Schema:
    return pa.schema([(f"byte{plane}", pa.uint8()) for plane in range(planes)])


def _read_vectors(path: Path, gram_II: Tensor) -> tuple[Tensor, Tensor]:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        abs_sum_I, sum_I = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("abs_sum", "sum"))
    for vector_I in (abs_sum_I, sum_I):
        if len(vector_I) != len(gram_II) or vector_I.dtype != gram_II.dtype:
            raise ValueError(f"{len(vector_I)} {vector_I.dtype} sums for {len(gram_II)} inputs")
    return abs_sum_I, sum_I


def _read_gram(path: Path) -> tuple[Tensor, int]:
    """The full matrix and its tokens."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        metadata = reader.schema.metadata or {}
        inputs, tokens = int(metadata[b"inputs"]), int(metadata[b"tokens"])
        dtype = _DTYPES[metadata[b"dtype"].decode()]
        entries = inputs * (inputs + 1) // 2
        # Before any memory is asked for: a header cannot claim more than the file has batches for.
        if inputs < 1 or tokens < 0 or entries > reader.num_record_batches * BATCH_ENTRIES:
            raise ValueError(f"{inputs} inputs, {tokens} tokens in {reader.num_record_batches} batches")
        if not reader.schema.equals(_schema(dtype.itemsize)):
            raise ValueError(f"columns {reader.schema.names} for {dtype}")
        triangle_N = _read_triangle(reader, entries, dtype)
    return _unpack_triangle(triangle_N, inputs), tokens


def _pack_triangle(gram: Tensor) -> np.ndarray:
    """The rows of the upper triangle end to end."""
    gram_II = gram.numpy()
    inputs = len(gram_II)
    triangle_N = np.empty(inputs * (inputs + 1) // 2, dtype=gram_II.dtype)
    position = 0
    for row in range(inputs):
        triangle_N[position : position + inputs - row] = gram_II[row, row:]
        position += inputs - row
    return triangle_N


def _read_triangle(reader: pa.ipc.RecordBatchFileReader, entries: int, dtype: torch.dtype) -> np.ndarray:
    planes_NP = np.empty((entries, dtype.itemsize), dtype=np.uint8)
    position = 0
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        for plane, column in enumerate(batch.columns):
            planes_NP[position : position + batch.num_rows, plane] = column.to_numpy()
        position += batch.num_rows
    if position != entries:
        raise ValueError(f"{position} entries instead of {entries}")
    return planes_NP.reshape(-1).view(str(dtype).removeprefix("torch."))


def _unpack_triangle(triangle_N: np.ndarray, inputs: int) -> Tensor:
    """The full matrix. Loops of numpy: threads of torch would wait for each other on a machine that does more."""
    gram_II = np.empty((inputs, inputs), dtype=triangle_N.dtype)
    position = 0
    for row in range(inputs):
        gram_II[row, row:] = triangle_N[position : position + inputs - row]
        position += inputs - row
    for start in range(0, inputs, PANEL_ROWS):
        stop = start + PANEL_ROWS
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
        corner_BB = gram_II[start:stop, start:stop]
        corner_BB[...] = np.where(np.tri(len(corner_BB), k=-1, dtype=bool), corner_BB.T, corner_BB)
    return torch.from_numpy(gram_II)
