"""Gradient sums on disk: Arrow IPC, one byte plane per byte significance, compressed with zstd. Lossless.

All matrices of a site are concatenated in `gradients.arrow`, with a uint8 column per byte plane, most significant last.
The schema metadata contain their names and shapes, the number of windows and the dtype.

Shapes: N entries, P bytes per number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch
from torch import Tensor

from crosscal.errors import CorruptArtifact, NotFinite
from crosscal.statistics.finite import all_finite
from crosscal.statistics.gradients import GradientSums
from crosscal.store.arrays import array_of, arrow_file
from crosscal.store.artifacts import Artifact, Store

BATCH_ENTRIES = 1 << 21  # per record batch: bounds the memory of writing and reading
FILE = "gradients.arrow"
_DTYPES = {"float32": np.float32, "float64": np.float64}


def write_gradients(folder: Path, sums: GradientSums) -> None:
    """Write the sums of one site into a folder. Raises `NotFinite` for sums that cannot be used."""
    if not all(map(all_finite, sums.squares.values())):
        raise NotFinite("gradients that are not finite are not stored", do="Calibrate in float32 or bfloat16.")
    dtype = next(iter(sums.squares.values())).numpy().dtype
    header = {
        "matrices": json.dumps({name: list(each.shape) for name, each in sums.squares.items()}),
        "dtype": str(dtype),
        "windows": str(sums.windows),
    }
    if sums.weighted_windows is not None:
        header["weighted_windows"] = repr(sums.weighted_windows)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    schema = pa.schema([(f"byte{plane}", pa.uint8()) for plane in range(dtype.itemsize)], header)
    with arrow_file(folder / FILE, schema, options) as writer:
        for square_OI in sums.squares.values():
            for part_N in square_OI.reshape(-1).split(BATCH_ENTRIES):
                planes_PN = part_N.contiguous().numpy().view(np.uint8).reshape(-1, dtype.itemsize).T
                writer.write_batch(pa.record_batch([array_of(plane_N) for plane_N in planes_PN], schema=schema))


def read_gradients(store: Store, artifact: Artifact) -> GradientSums:
    """Read the sums of one site, bit for bit as written. Raises `CorruptArtifact`."""
    try:
        with pa.memory_map(str(store.path(artifact, FILE))) as source:
            return _read(pa.ipc.open_file(source))
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise CorruptArtifact(
            "stored gradients cannot be read",
            where=f"{artifact.kind}/{artifact.key[:12]}",
            got=str(error)[:200],
            do="Remove this artifact; the same command then recomputes it.",
        ) from error


def _read(reader: pa.ipc.RecordBatchFileReader) -> GradientSums:
    said = reader.schema.metadata or {}
    dtype = np.dtype(_DTYPES[said[b"dtype"].decode()])
    shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(said[b"matrices"]).items()}
    weighted = float(said[b"weighted_windows"]) if b"weighted_windows" in said else None
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    squares: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        found, entries = [], 0
        while entries < math.prod(shape):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"{entries} entries instead of {math.prod(shape)} of {name}")
            planes = [column.to_numpy() for column in batch.columns]
            found.append(np.ascontiguousarray(np.stack(planes, axis=1)).view(dtype).reshape(-1))
            entries += batch.num_rows
        squares[name] = torch.from_numpy(np.concatenate(found)).view(shape)
    return GradientSums(squares, int(said[b"windows"]), weighted)
