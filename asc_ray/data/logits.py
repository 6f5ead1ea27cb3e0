"""The logit store: every system's logits by clip_id, one or more Arrow files a system, joined by clip_id only."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from asc_ray.data.arrow import map_batch, write_batch
from asc_ray.data.clips import ClipStore
from asc_ray.errors import UserError

REQUIRED_METADATA = ("system", "labels", "corpus")
IDS_SHOWN = 3


@dataclass(frozen=True)
class Logits:
    """One system's logits as its files hold them; `take` reads the numbers."""

    system: str
    labels: tuple[str, ...]
    files: tuple[Path, ...]
    starts: np.ndarray  # (files + 1,) the row at which each file starts, and the number of all rows
    metadata: dict[str, str]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def keys(self) -> pa.ChunkedArray:
        """The clip ids, (N,) utf8."""
        return pa.chunked_array([map_batch(file)["clip_id"] for file in self.files], pa.string())

    @property
    def ids(self) -> np.ndarray:
        """The clip ids, (N,) str."""
        return self.keys.to_numpy()

    def holds(self, store: ClipStore, rows: np.ndarray) -> bool:
        """Whether these are the store's clips `rows` in order; compared file by file, to save memory."""
        return len(self) == len(rows) and all(
            pa.chunked_array([map_batch(file, "clip_id")["clip_id"]]).equals(store.keys(rows[start:end]))
            for file, start, end in zip(self.files, self.starts, self.starts[1:], strict=False)
        )

    def values(self, file: int) -> np.ndarray:
        """Return the logits (n, K) float32 of one file over its memory map."""
        return map_batch(self.files[file], "logits")["logits"].flatten().to_numpy().reshape(-1, len(self.labels))

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the logits (len(rows), K) float32. Files are mapped one by one, so memory does not grow with N."""
        if out is None:
            out = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        of_file = np.searchsorted(self.starts, rows, side="right") - 1
        if (of_file[1:] < of_file[:-1]).any():
            order = np.argsort(of_file, kind="stable")
            out[order] = self.take(rows[order])
            return out
        files, firsts = np.unique(of_file, return_index=True)
        for index, first, end in zip(files, firsts, [*firsts[1:], len(rows)], strict=True):
            np.take(self.values(index), rows[first:end] - self.starts[index], axis=0, out=out[first:end], mode="clip")
        return out


def write_logits(file: Path, ids: Sequence[str] | np.ndarray, logits: np.ndarray, metadata: dict[str, str]) -> None:
    """Write (N, K) float32 logits of the N clips `ids`, whole or not at all.

    `metadata` holds at least system, labels (a JSON list, the columns' order) and corpus (its fingerprint); config
    (hash), checkpoint (sha256) and split are usual. Columns: clip_id utf8, logits fixed_size_list<float32>[K].
    """
    if missing := [key for key in REQUIRED_METADATA if key not in metadata]:
        raise ValueError(f"metadata lacks {missing}")
    scenes = len(json.loads(metadata["labels"]))
    if logits.shape != (len(ids), scenes):
        raise ValueError(f"logits are {logits.shape}, expected ({len(ids)} clips, {scenes} labels)")
    values = np.ascontiguousarray(logits, dtype=np.float32)
    batch = pa.RecordBatch.from_pydict(
        {
            "clip_id": pa.array(ids, pa.string()),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), scenes),
        },
        metadata=metadata,
    )
    write_batch(batch, file)


def read_logits(source: Path | Sequence[Path], split: str = "") -> Logits:
    """Read one system's logits from a folder's *.arrow files (of one split: SPLIT-*.arrow), or from the given files.

    The files' metadata may differ only in `split`; `Logits.metadata` has what they share.
    Raises UserError for no files, damaged files, and files of different systems, checkpoints or corpora.
    """
    pattern = f"{split}-*.arrow" if split else "*.arrow"
    files = sorted(source.glob(pattern)) if isinstance(source, Path) else list(source)
    if not files:
        raise UserError(f"{source}: no {pattern} file with logits; run the teachers' inference first")
    metadatas, counts = [], []
    for file in files:
        batch = map_batch(file)
        metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        if batch.schema.names != ["clip_id", "logits"] or any(key not in metadata for key in REQUIRED_METADATA):
            raise UserError(
                f"{file}: not a file of logits: columns {batch.schema.names}, metadata {sorted(metadata)}; expected "
                f"columns clip_id, logits and metadata {', '.join(REQUIRED_METADATA)}"
            )
        metadatas.append(metadata)
        counts.append(batch.num_rows)
    first = metadatas[0]
    for file, metadata in zip(files, metadatas, strict=True):
        keys = (first.keys() | metadata.keys()) - {"split"}
        if different := sorted(key for key in keys if first.get(key) != metadata.get(key)):
            raise UserError(
                f"{file}: differs from {files[0]} in {', '.join(different)}; one system's files are expected"
            )
    return Logits(
        system=first["system"],
        labels=tuple(json.loads(first["labels"])),
        files=tuple(files),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        metadata={key: value for key, value in first.items() if all(m.get(key) == value for m in metadatas)},
    )


class Ensemble:
    """The logits of S systems for the N clips `ids`, in that order, joined by clip_id and read when they are needed.

    A system may hold further clips. Raises UserError for systems of different corpora or label orders, two systems with
    one name, a clip that occurs twice in a system or in `ids`, and clips that a system lacks.
    """

    def __init__(self, systems: Sequence[Logits], ids: Sequence[str] | np.ndarray | pa.ChunkedArray) -> None:
        if not systems:
            raise UserError("no system's logits to join")
        first = systems[0]
        wanted = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([pa.array(ids, pa.string())])
        names = Counter(system.system for system in systems)
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"systems of one name: {', '.join(twice)}; names must differ")
        _refuse_duplicates("the requested clips", wanted)
        self._pieces: list[tuple[Logits, np.ndarray]] = []  # a system, and the clips' rows in it
        for system in systems:
            if system.metadata["corpus"] != first.metadata["corpus"]:
                raise UserError(
                    f"systems {first.system} and {system.system} are of different corpora: fingerprints "
                    f"{first.metadata['corpus'][:12]} and {system.metadata['corpus'][:12]}"
                )
            if system.labels != first.labels:
                raise UserError(
                    f"systems {first.system} and {system.system} have different labels or label orders: "
                    f"{', '.join(first.labels)} and {', '.join(system.labels)}"
                )
            if self._pieces and _same_clips(system, self._pieces[-1][0]):
                rows = self._pieces[-1][1]
            else:
                rows = _rows(system.system, system.keys, wanted)
            self._pieces.append((system, rows))

    def piece(self, rows: slice) -> "Piece":
        chosen = {id(found): found[rows] for _, found in self._pieces}  # one array for systems that share one
        return Piece(tuple((system, chosen[id(found)]) for system, found in self._pieces))

    def read(self) -> np.ndarray:
        """Read all logits, (S, N, K) float32. Raises UserError for logits that are not finite."""
        return self.piece(slice(None))()


@dataclass(frozen=True)
class Piece:
    """Some clips of an ensemble, read anew by each call; it can be sent to another process."""

    systems: tuple[tuple[Logits, np.ndarray], ...]

    def __call__(self) -> np.ndarray:
        """Read these clips' logits, (S, n, K) float32. Raises UserError for logits that are not finite."""
        logits, rows = self.systems[0]
        joined = np.empty((len(self.systems), len(rows), len(logits.labels)), dtype=np.float32)
        for out, (system, found) in zip(joined, self.systems, strict=True):
            system.take(found, out)
            finite = np.isfinite(out).all(axis=1)
            if not finite.all():
                broken = system.keys.take(pa.array(found[~finite]))
                raise UserError(
                    f"system {system.system}: logits of {len(broken)} of {len(found)} clips are not finite: "
                    f"{_some(broken)}"
                )
        return joined


def _same_clips(one: Logits, other: Logits) -> bool:
    """Whether two systems have the same clips in the same order, as usual; compared file by file, to save memory."""
    return np.array_equal(one.starts, other.starts) and all(
        map_batch(a)["clip_id"].equals(map_batch(b)["clip_id"]) for a, b in zip(one.files, other.files, strict=True)
    )


def _rows(name: str, keys: pa.ChunkedArray, wanted: pa.ChunkedArray) -> np.ndarray:
    """Return the rows of the clips `wanted` among a system's."""
    if keys.equals(wanted):
        return np.arange(len(wanted))
    _refuse_duplicates(f"system {name}", keys)
    found = pc.index_in(wanted, value_set=keys)
    if found.null_count:
        missing = wanted.filter(found.is_null())
        raise UserError(f"system {name} lacks {len(missing)} of {len(wanted)} clips: {_some(missing)}")
    return found.to_numpy()


def _refuse_duplicates(owner: str, ids: pa.ChunkedArray) -> None:
    # Hashes are compared first, because a table of all ids takes a gigabyte for ten million clips.
    hashes = np.concatenate([np.fromiter(map(hash, chunk.to_pylist()), np.int64, len(chunk)) for chunk in ids.chunks])
    hashes.sort()
    if (hashes[1:] == hashes[:-1]).any() and pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise UserError(f"{owner}: {len(twice)} clips occur more than once: {_some(twice)}")


def _some(ids: pa.Array | pa.ChunkedArray) -> str:
    return ", ".join(ids[:IDS_SHOWN].to_pylist()) + (", ..." if len(ids) > IDS_SHOWN else "")
