"""Files of consecutive clips that a stage makes one by one: what a killed run finished, and what is left to do.

A piece is a file PREFIX-FIRST.arrow beside a record PREFIX-FIRST.json with the clips that the file covers and its
checksum. What is left to do follows from these records alone and not from how an earlier run divided the clips, so
another size of pieces neither loses a clip nor makes one twice.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asc_ray import remote
from asc_ray.artifacts import file_sha256, read_record, write_record
from asc_ray.places import is_kept

Record = Mapping[str, Any]
Ids = Sequence[str] | np.ndarray


def piece_file(folder: Path, prefix: str, first: int) -> Path:
    """Return the file of the piece that begins with the clip at position `first`; names sort by position."""
    return folder / f"{prefix}-{first:09d}.arrow"


def note_piece(file: Path, ids: Ids, facts: Record) -> dict[str, Any]:
    """Write the record of a finished piece that covers the clips `ids`, and return it.

    In an object storage both are there afterwards, the record last.
    """
    first = int(file.stem.rpartition("-")[2])
    record = {**facts, "file": file.name, "first": first, "clips": len(ids), "ids": _digest(ids)}
    record |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    remote.push(file)
    write_record(file.with_suffix(".json"), record)
    return record


def finished_pieces(
    folder: Path, prefix: str, ids: Ids, accept: Callable[[Record], bool] = lambda record: True
) -> list[dict[str, Any]]:
    """Return the records of the whole pieces in `folder` that cover the clips of `ids` that they say, in order.

    All other files of the prefix are removed: those of other clips, those that are cut or changed, have no record,
    overlap the one before, or that `accept` refuses. Of an object storage, which has a file whole or not at all, only
    the records are brought.
    """
    remote.pull(folder, f"{prefix}-*.json")
    sizes = {name: info.size for name, info in remote.listed(folder).items()} if is_kept(folder) else None
    found: list[dict[str, Any]] = []
    end = 0
    for name in sorted({path.stem for path in folder.glob(f"{prefix}-*")}):
        file = folder / f"{name}.arrow"
        record = read_record(file.with_suffix(".json"))
        if record and _covers(record, file, ids, sizes) and record["first"] >= end and accept(record):
            end = record["first"] + record["clips"]
            found.append(record)
        else:
            for path in folder.glob(f"{name}.*"):
                path.unlink()
    return found


def known_files(records: Sequence[Record]) -> dict[str, Record]:
    """Return what `Artifact.finish` asks to know of the pieces' files."""
    return {record["file"]: record for record in records}


def missing_pieces(count: int, finished: Sequence[Record], size: int) -> list[slice]:
    """Return the positions, of `count` clips, that no finished piece covers, in slices of at most `size`."""
    gaps, start = [], 0
    for first, clips in [*((record["first"], record["clips"]) for record in finished), (count, 0)]:
        gaps += [slice(at, min(at + size, first)) for at in range(start, first, size)]
        start = first + clips
    return gaps


def _covers(record: Record, file: Path, ids: Ids, sizes: Mapping[str, int] | None) -> bool:
    first, clips = record.get("first"), record.get("clips")
    if not isinstance(first, int) or not isinstance(clips, int) or record.get("file") != file.name:
        return False
    own = ids[first : first + clips]
    if sizes is None:
        same = file.is_file() and record.get("sha256") == file_sha256(file)
    else:
        same = record.get("bytes") == sizes.get(file.name, -1)
    return (
        piece_file(file.parent, file.stem.rpartition("-")[0], first) == file
        and len(own) == clips > 0
        and record.get("ids") == _digest(own)
        and "bytes" in record
        and same
    )


def _digest(ids: Ids) -> str:
    return hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()
