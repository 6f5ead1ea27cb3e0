"""The clip store: one-second clips as int16 PCM at 32 kHz in memory-mapped Arrow files."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from asc_ray.artifacts import stored_files
from asc_ray.data.arrow import map_batch, write_batch
from asc_ray.data.corpus import Clip
from asc_ray.errors import UserError

SAMPLE_RATE = 32_000
CLIP_SAMPLES = 32_000
SHARD = "shard"  # the files' prefix
SHARD_CLIPS = 4_096
SPLITS = ("train", "test")


def write_clips(
    file: Path, clips: Sequence[Clip], pcm: np.ndarray, labels: Sequence[str], devices: Sequence[str], fingerprint: str
) -> None:
    """Write clips and their samples (N, 32000) int16 as one Arrow IPC file; the same input gives the same bytes.

    Columns: clip_id utf8; scene, device, location (the clip's place), split dictionary<int32, utf8>; energy float32,
    the sum of (pcm / 32768)^2; pcm fixed_size_list<int16>[32000]. Schema metadata: labels and devices (JSON, the
    dictionaries' order), sample_rate, corpus (its fingerprint).
    """

    def dictionary(values: list[str], vocabulary: Sequence[str]) -> pa.Array:
        index = {value: position for position, value in enumerate(vocabulary)}
        return pa.DictionaryArray.from_arrays(
            pa.array([index[value] for value in values], pa.int32()), pa.array(vocabulary, pa.string())
        )

    places = [clip.place for clip in clips]
    # Sums of squared integers are exact in float64, so the order of summation does not matter.
    energy = [float(np.dot(wave, wave)) / 32768**2 for wave in (row.astype(np.float64) for row in pcm)]
    batch = pa.RecordBatch.from_pydict(
        {
            "clip_id": pa.array([clip.clip_id for clip in clips], pa.string()),
            "scene": dictionary([clip.scene for clip in clips], labels),
            "device": dictionary([clip.device for clip in clips], devices),
            "location": dictionary(places, sorted(set(places))),
            "split": dictionary([clip.split for clip in clips], SPLITS),
            "energy": pa.array(np.array(energy, dtype=np.float32)),
            "pcm": pa.FixedSizeListArray.from_arrays(pa.array(pcm.reshape(-1)), CLIP_SAMPLES),
        },
        metadata={
            "labels": json.dumps(list(labels)),
            "devices": json.dumps(list(devices)),
            "sample_rate": str(SAMPLE_RATE),
            "corpus": fingerprint,
        },
    )
    write_batch(batch, file)


def open_clips(folder: Path) -> "ClipStore":
    """Open the clip store of a finished artifact. Raises UserError where one of its files is not as it was written."""
    return ClipStore(folder, stored_files(folder, f"{SHARD}-*.arrow"))


class ClipStore:
    """The shards of a folder as one table of N clips; PCM stays on disk, mapped into memory.

    ids, device, place, split: (N,) str; scene: (N,) int64 into `labels`; energy: (N,) float32; labels, devices:
    tuples; corpus: the fingerprint. Without `files` all shards in the folder are read. Pickling sends only the paths,
    and the other end opens them again.
    Raises UserError for a folder without shards, a damaged shard, shards of different corpora, a clip held twice.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        self.folder = Path(folder)
        self._files = files = sorted(self.folder.glob(f"{SHARD}-*.arrow")) if files is None else list(files)
        if not files:
            raise UserError(f"{self.folder}: no {SHARD}-*.arrow files; run the ingest stage first")
        batches = [map_batch(file) for file in files]
        metadata = batches[0].schema.metadata
        for file, batch in zip(files, batches, strict=True):
            if batch.schema != batches[0].schema or batch.schema.metadata != metadata:
                raise UserError(f"{file}: not of one store with {files[0].name} (corpus, labels or columns differ)")
        try:
            self.labels: tuple[str, ...] = tuple(json.loads(metadata[b"labels"]))
            self.devices: tuple[str, ...] = tuple(json.loads(metadata[b"devices"]))
            self.corpus: str = metadata[b"corpus"].decode()
            self.ids = np.concatenate([batch["clip_id"].to_numpy(zero_copy_only=False) for batch in batches])
            self.scene = np.concatenate([batch["scene"].indices.to_numpy() for batch in batches]).astype(np.int64)
            self.device, self.place, self.split = (
                np.concatenate([_strings(batch[column]) for batch in batches])
                for column in ("device", "location", "split")
            )
            self.energy = np.concatenate([batch["energy"].to_numpy() for batch in batches])
            self._pcm = [batch["pcm"].flatten().to_numpy().reshape(-1, CLIP_SAMPLES) for batch in batches]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{files[0]}: not a shard of a clip store ({error!r})") from error
        self._starts = np.cumsum([0, *(len(rows) for rows in self._pcm)])
        if len(self._row_of) != len(self):
            raise UserError(f"{self.folder}: {len(self) - len(self._row_of)} clip(s) held twice; run ingest again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self):
        return ClipStore, (self.folder, self._files)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {clip_id: row for row, clip_id in enumerate(self.ids)}

    @property
    def clips(self) -> list[Clip]:
        """The rows as clips of the corpus, for `partition` and `unseen_devices`."""
        columns = (self.ids, np.array(self.labels)[self.scene], self.device, self.place, self.split)
        return [Clip(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def index_of(self, ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the rows (len(ids),) int64 of the clips `ids`. Raises UserError for clips that the store lacks."""
        if missing := [clip_id for clip_id in ids if clip_id not in self._row_of]:
            raise UserError(f"{self.folder}: holds no clip {', '.join(missing[:3])} ({len(missing)} missing)")
        return np.array([self._row_of[clip_id] for clip_id in ids], dtype=np.int64)

    def pcm(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return (B, 32000) int16 of the given rows in the given order, in `out` where given."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of a store of {len(self)} clips")
        if out is None:
            out = np.empty((len(indices), CLIP_SAMPLES), dtype=np.int16)
        shard = np.searchsorted(self._starts, indices, side="right") - 1
        for position, (s, row) in enumerate(zip(shard.tolist(), indices.tolist(), strict=True)):
            out[position] = self._pcm[s][row - self._starts[s]]
        return out


def _strings(column: pa.DictionaryArray) -> np.ndarray:
    vocabulary = np.array(column.dictionary.to_pylist(), dtype=str)
    return vocabulary[column.indices.to_numpy()]
