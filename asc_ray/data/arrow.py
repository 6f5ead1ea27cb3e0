"""Arrow IPC files of one record batch: written whole or not at all, read memory-mapped without a copy."""

import os
import uuid
from pathlib import Path

import pyarrow as pa

from asc_ray.errors import UserError


def write_batch(batch: pa.RecordBatch, file: Path) -> None:
    """Write under a temporary name, fsync, rename: a reader never sees half a file."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as sink:
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def map_batch(file: Path, column: str | None = None) -> pa.RecordBatch:
    """Return the file's record batch over its memory map; with `column` this one alone, and no other is looked at.

    Raises UserError, naming the file, where it is damaged or has no such column.
    """
    try:
        with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
            if reader.num_record_batches != 1:
                raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of one")
            batch = reader.get_batch(0)
            batch = batch.select([column]) if column else batch
            batch.validate(full=True)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{file}: truncated or corrupted Arrow file ({error}). Delete it and run the stage again."
        ) from error
    return batch
