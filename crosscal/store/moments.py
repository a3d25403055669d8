"""Moments on disk: Arrow IPC, the upper triangle of the Gram matrix as byte planes, each compressed with zstd.

The bytes of floating-point numbers compress when bytes of equal significance stand together (exponents next to
exponents): a lossless file of about 0.43 of the full matrix. `gram.arrow` has one uint8 column per byte plane, most
significant last; `vectors.arrow` has `abs_sum` and `sum`; tokens and dtype stand in the schema metadata.

Shapes: I inputs, N = I (I + 1) / 2 entries of the triangle, P bytes a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch

from crosscal.errors import CorruptArtifact
from crosscal.statistics.moments import InputMoments
from crosscal.store.artifacts import Artifact, Store

BATCH_ENTRIES = 1 << 21  # triangle entries per record batch: bounds the memory of writing and reading
MAX_INPUTS = 1 << 17  # 128 GiB of fp32 Gram matrix: more is a damaged header, not a model
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def write_moments(folder: Path, moments: InputMoments) -> None:
    """Write `gram.arrow` and `vectors.arrow` into a folder."""
    dtype = str(moments.gram_II.dtype).removeprefix("torch.")
    metadata = {"inputs": str(moments.inputs), "tokens": str(moments.tokens), "dtype": dtype}
    planes_NP = _pack_triangle(moments.gram_II.numpy())
    schema = pa.schema([(f"byte{p}", pa.uint8()) for p in range(planes_NP.shape[1])], metadata=metadata)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    with pa.ipc.new_file(str(folder / "gram.arrow"), schema, options=options) as writer:
        for start in range(0, len(planes_NP), BATCH_ENTRIES):
            part_PN = np.ascontiguousarray(planes_NP[start : start + BATCH_ENTRIES].T)
            writer.write_batch(pa.record_batch([pa.array(plane) for plane in part_PN], schema=schema))
    vectors = pa.table({"abs_sum": moments.abs_sum_I.numpy(), "sum": moments.sum_I.numpy()})
    with pa.ipc.new_file(str(folder / "vectors.arrow"), vectors.schema, options=options) as writer:
        writer.write_table(vectors)


def read_moments(store: Store, artifact: Artifact) -> InputMoments:
    """Read moments back, bit for bit. Raises `CorruptArtifact`."""
    where = f"{artifact.kind}/{artifact.key[:12]}"
    try:
        with pa.memory_map(str(store.path(artifact, "gram.arrow"))) as source:
            reader = pa.ipc.open_file(source)
            inputs, tokens, dtype = _header(reader.schema.metadata)
            gram_II = _unpack_triangle(reader, inputs, dtype)
        with pa.memory_map(str(store.path(artifact, "vectors.arrow"))) as source:
            vectors = pa.ipc.open_file(source).read_all()
            abs_sum_I, sum_I = (torch.from_numpy(vectors[name].to_numpy().copy()) for name in ("abs_sum", "sum"))
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise CorruptArtifact("stored moments cannot be read", where=where, got=str(error)[:200]) from error
    return InputMoments(gram_II, abs_sum_I, sum_I, tokens)


def _header(metadata: dict[bytes, bytes]) -> tuple[int, int, torch.dtype]:
    inputs, tokens = int(metadata[b"inputs"]), int(metadata[b"tokens"])
    if not 0 < inputs <= MAX_INPUTS or tokens < 0:
        raise ValueError(f"{inputs} inputs, {tokens} tokens")
    return inputs, tokens, _DTYPES[metadata[b"dtype"].decode()]


def _pack_triangle(gram_II: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of the upper triangle end to end, as bytes: [N, P]."""
    inputs = len(gram_II)
    triangle_N = np.empty(inputs * (inputs + 1) // 2, dtype=gram_II.dtype)
    position = 0
    for row in range(inputs):
        triangle_N[position : position + inputs - row] = gram_II[row, row:]
        position += inputs - row
    return triangle_N.view(np.uint8).reshape(len(triangle_N), gram_II.itemsize)


def _unpack_triangle(reader: pa.ipc.RecordBatchFileReader, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    entries = inputs * (inputs + 1) // 2
    planes_NP = np.empty((entries, dtype.itemsize), dtype=np.uint8)
    position = 0
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        planes_NP[position : position + batch.num_rows] = np.stack(
            [column.to_numpy() for column in batch.columns], axis=1
        )
        position += batch.num_rows
    if position != entries:
        raise ValueError(f"{position} entries instead of {entries}")
    triangle_N = planes_NP.reshape(-1).view(np.dtype(str(dtype).removeprefix("torch.")))
    gram_II = np.empty((inputs, inputs), dtype=triangle_N.dtype)
    position = 0
    for row in range(inputs):
        gram_II[row, row:] = triangle_N[position : position + inputs - row]
        gram_II[row:, row] = gram_II[row, row:]
        position += inputs - row
    return torch.from_numpy(gram_II)
