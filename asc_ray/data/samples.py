"""Samples of single clips, read from where a shard lies in the storage, without the rest of the shard.

Beside each shard of a clip store lies its index: all columns but the samples, and a checksum of each clip's samples.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from asc_ray import remote
from asc_ray.data.arrow import map_batch, write_batch
from asc_ray.errors import UserError
from asc_ray.places import named

INDEX = ".index"  # ends the name of a shard's index, in place of .arrow
_SAMPLES_AT = b"samples_at"  # where the samples begin in the shard, in bytes


def checksums(pcm: np.ndarray) -> np.ndarray:
    """Return the CRC-32 (N,) uint32 of each clip of (N, 32000) int16."""
    return np.array([zlib.crc32(clip) for clip in pcm], np.uint32)


def write_index(shard: Path, sums: np.ndarray) -> Path:
    """Write the index of a shard, whose clips have the checksums `sums` (N,), and return its file.

    Columns: those of the shard but pcm, and crc32 uint32, whose field says samples_at. Schema metadata: the shard's.
    """
    source = pa.memory_map(str(shard))
    with pa.ipc.open_file(source) as reader:
        batch = reader.get_batch(0)
    at = batch["pcm"].values.buffers()[1].address - source.read_buffer(1).address
    crc32 = pa.field("crc32", pa.uint32(), metadata={_SAMPLES_AT: str(at)})
    columns = batch.select([name for name in batch.schema.names if name != "pcm"])
    index = shard.with_suffix(INDEX)
    write_batch(columns.append_column(crc32, pa.array(sums, pa.uint32())), index)
    return index


def read_samples(indexes: Sequence[Path], of: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Read clip `rows[i]` of the shard that has `indexes[of[i]]` into `out[i]`, for all i; `out`: (n, 32000) int16.

    Clips that follow each other, in the shard and here, are read at once. Raises UserError where a clip is not as it
    was written, and DiskError where the storage cannot be read.
    """
    edges = np.flatnonzero((np.diff(of) != 0) | (np.diff(rows) != 1)) + 1
    runs = [run for run in np.split(np.arange(len(rows)), edges) if len(run)]
    opened = [map_batch(index) for index in indexes]

    def read(run: np.ndarray) -> None:
        number, first, own = of[run[0]], int(rows[run[0]]), out[run[0] : run[-1] + 1]
        index, shard = opened[number], indexes[number].with_suffix(".arrow")
        at = int(index.schema.field("crc32").metadata[_SAMPLES_AT]) + first * own[0].nbytes
        samples = remote.part(shard, at, own.nbytes)
        wrong = 0
        if len(samples) == own.nbytes:
            own[:] = np.frombuffer(samples, np.int16).reshape(own.shape)
            differ = np.flatnonzero(checksums(own) != index["crc32"].to_numpy()[rows[run]])
            if not len(differ):
                return
            wrong = int(differ[0])
        raise UserError(
            f"{named(shard)}: the samples of {index['clip_id'][first + wrong]} are not as they were written; delete "
            f"the folder {named(shard.parent)} and run its stage again: it is made anew"
        )

    remote.together(read, runs)
