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
from asc_ray.errors import UserError

REQUIRED_METADATA = ("system", "labels", "corpus")
IDS_SHOWN = 3


@dataclass(frozen=True)
class Logits:
    system: str
    labels: tuple[str, ...]
    keys: pa.ChunkedArray  # (N,) utf8, the clip ids, mapped
    values: np.ndarray  # (N, K) float32, the columns in the order of `labels`
    metadata: dict[str, str]

    @property
    def ids(self) -> np.ndarray:
        """(N,) str."""
        return self.keys.to_numpy()


def write_logits(file: Path, ids: Sequence[str] | np.ndarray, logits: np.ndarray, metadata: dict[str, str]) -> None:
    """Write (N, K) float32 logits of the N clips `ids`, whole or not at all.

    `metadata` holds at least system, labels (a JSON list, the columns' order) and corpus (its fingerprint); config
    (hash), checkpoint (sha256) and split are usual. Columns: clip_id utf8, logits fixed_size_list<float32>[K].
    """
    if missing := [key for key in REQUIRED_METADATA if key not in metadata]:
        raise ValueError(f"metadata lacks {missing}")
    classes = len(json.loads(metadata["labels"]))
    if logits.shape != (len(ids), classes):
        raise ValueError(f"logits are {logits.shape}, expected ({len(ids)} clips, {classes} labels)")
    values = np.ascontiguousarray(logits, dtype=np.float32)
    batch = pa.RecordBatch.from_pydict(
        {
            "clip_id": pa.array(ids, pa.string()),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), classes),
        },
        metadata=metadata,
    )
    write_batch(batch, file)


def read_logits(source: Path | Sequence[Path]) -> Logits:
    """One system's logits from a folder's *.arrow files or from the given files; memory-mapped where it is one file.

    The files may differ in the metadata key `split` and in nothing else; `Logits.metadata` has what they share.
    Raises UserError for no files, damaged files, and files of different systems, checkpoints or corpora.
    """
    files = sorted(source.glob("*.arrow")) if isinstance(source, Path) else list(source)
    if not files:
        raise UserError(f"{source}: no *.arrow file with logits; run the teachers' inference first")
    batches = [map_batch(file) for file in files]
    metadatas = []
    for file, batch in zip(files, batches, strict=True):
        metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        if batch.schema.names != ["clip_id", "logits"] or any(key not in metadata for key in REQUIRED_METADATA):
            raise UserError(
                f"{file}: not a file of logits: columns {batch.schema.names}, metadata {sorted(metadata)}; expected "
                f"columns clip_id, logits and metadata {', '.join(REQUIRED_METADATA)}"
            )
        metadatas.append(metadata)
    first = metadatas[0]
    for file, metadata in zip(files, metadatas, strict=True):
        keys = (first.keys() | metadata.keys()) - {"split"}
        if different := sorted(key for key in keys if first.get(key) != metadata.get(key)):
            raise UserError(
                f"{file}: differs from {files[0]} in {', '.join(different)}; one system's files are expected"
            )
    labels = tuple(json.loads(first["labels"]))
    values = [batch["logits"].flatten().to_numpy().reshape(-1, len(labels)) for batch in batches]
    return Logits(
        system=first["system"],
        labels=labels,
        keys=pa.chunked_array([batch["clip_id"] for batch in batches], pa.string()),
        values=values[0] if len(values) == 1 else np.concatenate(values),
        metadata={key: value for key, value in first.items() if all(m.get(key) == value for m in metadatas)},
    )


def join(systems: Sequence[Logits], ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """(S, N, K) float32: the S systems' logits of the N clips `ids`, in that order, joined by clip_id.

    A system may hold further clips. Raises UserError for systems of different corpora or label orders, two systems of
    one name, a clip twice in a system or in `ids`, clips that a system lacks, and logits that are not finite.
    """
    if not systems:
        raise UserError("no system's logits to join")
    first = systems[0]
    wanted = pa.array(ids, pa.string())
    _refuse_duplicates("the requested clips", wanted)
    names = Counter(system.system for system in systems)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"systems of one name: {', '.join(twice)}; names must differ")
    rows, rows_of = np.empty(0, dtype=np.int64), None
    joined = np.empty((len(systems), len(wanted), len(first.labels)), dtype=np.float32)
    for position, system in enumerate(systems):
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
        if rows_of is None or not system.keys.equals(rows_of):  # systems usually hold the same clips in the same order
            _refuse_duplicates(f"system {system.system}", system.keys)
            found = pc.index_in(wanted, value_set=system.keys)
            if found.null_count:
                missing = wanted.filter(found.is_null())
                raise UserError(f"system {system.system} lacks {len(missing)} of {len(wanted)} clips: {_some(missing)}")
            rows, rows_of = found.to_numpy(), system.keys
        np.take(system.values, rows, axis=0, out=joined[position])
        broken = wanted.filter(pa.array(~np.isfinite(joined[position]).all(axis=1)))
        if len(broken):
            raise UserError(f"system {system.system}: logits of {len(broken)} clips are not finite: {_some(broken)}")
    return joined


def _refuse_duplicates(owner: str, ids: pa.Array | pa.ChunkedArray) -> None:
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise UserError(f"{owner}: {len(twice)} clips occur more than once: {_some(twice)}")


def _some(ids: pa.Array) -> str:
    return ", ".join(ids[:IDS_SHOWN].to_pylist()) + (", ..." if len(ids) > IDS_SHOWN else "")
