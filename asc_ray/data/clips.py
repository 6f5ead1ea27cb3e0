"""The clip store: one-second clips as int16 PCM at 32 kHz in memory-mapped Arrow files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from asc_ray.artifacts import read_manifest, stored_files
from asc_ray.data.arrow import map_batch, write_batch
from asc_ray.data.clip import Clip
from asc_ray.data.samples import INDEX, checksums, read_samples, write_index
from asc_ray.errors import UserError

SAMPLE_RATE = 32_000
CLIP_SAMPLES = 32_000
SHARD = "shard"  # the files' prefix
SHARD_CLIPS = 4_096
SPLITS = ("train", "test")
_INDEX_BYTES = 28  # at least, a clip: its columns have a word of 32 bits each


def write_clips(
    file: Path,
    clips: Sequence[Clip],
    pcm: np.ndarray,
    labels: Sequence[str],
    devices: Sequence[str],
    fingerprint: str,
    cut: bool = False,
) -> None:
    """Write clips and their samples (N, 32000) int16 as one Arrow IPC file, a shard, and its index beside it.

    The same input gives the same bytes.

    Columns: clip_id utf8; scene, device, location (the clip's place), split dictionary<int32, utf8>; energy float32,
    the sum of (pcm / 32768)^2; pcm fixed_size_list<int16>[32000]. Clips that were `cut` from recordings also have
    recording dictionary<int32, utf8>, its file, and second int32, from 0. Schema metadata: labels and devices (JSON,
    the dictionaries' order), sample_rate, corpus (its fingerprint).
    """

    def dictionary(values: list[str], vocabulary: Sequence[str]) -> pa.Array:
        index = {value: position for position, value in enumerate(vocabulary)}
        return pa.DictionaryArray.from_arrays(
            pa.array([index[value] for value in values], pa.int32()), pa.array(vocabulary, pa.string())
        )

    places = [clip.place for clip in clips]
    of_cut = {}
    if cut:
        recordings = [clip.recording for clip in clips]
        of_cut["recording"] = dictionary(recordings, sorted(set(recordings)))
        of_cut["second"] = pa.array([clip.second for clip in clips], pa.int32())
    # Sums of squared integers are exact in float64, so the order of summation does not matter.
    energy = [float(np.dot(wave, wave)) / 32768**2 for wave in (row.astype(np.float64) for row in pcm)]
    batch = pa.RecordBatch.from_pydict(
        {
            "clip_id": pa.array([clip.clip_id for clip in clips], pa.string()),
            "scene": dictionary([clip.scene for clip in clips], labels),
            "device": dictionary([clip.device for clip in clips], devices),
            "location": dictionary(places, sorted(set(places))),
            "split": dictionary([clip.split for clip in clips], SPLITS),
            **of_cut,
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
    write_index(file, checksums(pcm))


def open_clips(folder: Path, whole: bool = True) -> "ClipStore":
    """Open the clip store of a finished artifact, of which this node needs the shards' indexes alone.

    The shards are brought and compared when samples are asked for first. Unless `whole`, they stay where they lie, and
    single clips are read there. Stores made before version 0.3.0 have no indexes: their shards are brought at once.
    Raises UserError where a file is not as it was written.
    """
    indexed = any(name.endswith(INDEX) for name in read_manifest(folder)["files"])
    return ClipStore(folder, stored_files(folder, f"{SHARD}-*{INDEX if indexed else '.arrow'}"), whole)


@dataclass(frozen=True, eq=False)
class Names:
    """A name for each of N clips: `codes` (N,) are numbers of `names` (M,) str. An index gives the clips' names."""

    codes: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.names[self.codes[rows]]

    def __eq__(self, name: object) -> np.ndarray:  # type: ignore[override]
        return self.isin([str(name)])

    __hash__ = None  # type: ignore[assignment]

    def isin(self, names: Sequence[str]) -> np.ndarray:
        """Return which clips (N,) bool have one of these names."""
        return np.isin(self.names, names)[self.codes]

    def among(self, rows: Any) -> list[str]:
        """Return the names that these clips have, sorted."""
        return sorted(self.names[np.unique(self.codes[rows])].tolist())


class ClipStore:
    """The shards of a folder as one table of N clips, of which some 20 bytes a clip are in memory.

    scene: (N,) int64 into `labels`; device, place, split: Names; energy: (N,) float32; labels, devices: tuples; corpus:
    the fingerprint. recording, second: Names and (N,) int32 of clips that are seconds of longer recordings, else None.
    Ids and PCM stay on disk, mapped where they are asked for. `files` are shards, or the indexes of a finished
    artifact's, which `whole` says how to read samples of (`open_clips`). Without `files` all shards in the folder are
    read, and their ids compared, which those of a finished artifact were at its ingest. Pickling sends only the paths,
    and the other end opens them again.
    Raises UserError for a folder without shards, a damaged shard, shards of different corpora, a clip held twice.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None, whole: bool = True):
        self.folder, checked = Path(folder), files is not None
        self._files = files = sorted(self.folder.glob(f"{SHARD}-*.arrow")) if files is None else list(files)
        if not files:
            raise UserError(f"{self.folder}: no {SHARD}-*.arrow files; run the ingest stage first")
        schema = map_batch(files[0]).schema
        indexed, self._whole = files[0].suffix == INDEX, whole
        self._shards = None if indexed else files
        # As many clips as the files can hold; what is not filled takes no memory.
        least = _INDEX_BYTES if indexed else 2 * CLIP_SAMPLES
        most = sum(file.stat().st_size for file in files if file.exists()) // least
        scene, energy = np.empty(most, np.int64), np.empty(most, np.float32)
        device, place, split = (_Codes(np.empty(most, dtype)) for dtype in (np.int16, np.int32, np.int8))
        cut = "recording" in schema.names
        recording, second = _Codes(np.empty(most if cut else 0, np.int32)), np.empty(most if cut else 0, np.int32)
        starts = [0]
        for file in files:
            batch = map_batch(file)  # it is let go at once, for what was looked at would count as memory
            if batch.schema != schema or batch.schema.metadata != schema.metadata:
                raise UserError(f"{file}: not of one store with {files[0].name} (corpus, labels or columns differ)")
            try:
                own = slice(starts[-1], starts[-1] + batch.num_rows)
                scene[own], energy[own] = batch["scene"].indices.to_numpy(), batch["energy"].to_numpy()
                device.fill(own, batch["device"])
                place.fill(own, batch["location"])
                split.fill(own, batch["split"])
                if cut:
                    recording.fill(own, batch["recording"])
                    second[own] = batch["second"].to_numpy()
                starts.append(own.stop)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(f"{file}: not a shard of a clip store ({error!r})") from error
        try:
            self.labels: tuple[str, ...] = tuple(json.loads(schema.metadata[b"labels"]))
            self.devices: tuple[str, ...] = tuple(json.loads(schema.metadata[b"devices"]))
            self.corpus: str = schema.metadata[b"corpus"].decode()
        except (KeyError, TypeError) as error:
            raise UserError(f"{files[0]}: not a shard of a clip store ({error!r})") from error
        self._starts = np.array(starts)
        self.scene, self.energy = scene[: starts[-1]], energy[: starts[-1]]
        self.device, self.place, self.split = (codes.names(starts[-1]) for codes in (device, place, split))
        self.recording = recording.names(starts[-1]) if cut else None
        self.second = second[: starts[-1]] if cut else None
        self._pcm: dict[int, np.ndarray] = {}  # by shard, mapped
        if not checked and (twice := len(self) - pc.count_distinct(self.keys()).as_py()):
            raise UserError(f"{self.folder}: {twice} clip(s) held twice; run ingest again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self):
        return ClipStore, (self.folder, self._files, self._whole)

    @property
    def unseen_devices(self) -> tuple[str, ...]:
        """The devices that occur in the test split only, sorted."""
        trained = set(self.device.among(self.split == "train"))
        return tuple(device for device in self.device.among(self.split == "test") if device not in trained)

    @property
    def ids(self) -> "Ids":
        """The clips' ids; an index gives those of some clips, (n,) str."""
        return Ids(self)

    def numbers(self, rows: Any) -> np.ndarray:
        """Return the row numbers that an index means."""
        if isinstance(rows, np.ndarray) and rows.dtype == np.int64 and rows.min(initial=0) >= 0:
            return rows  # as it mostly is, without a table of all rows
        return np.arange(len(self))[rows]

    def keys(self, rows: Any = slice(None)) -> pa.ChunkedArray:
        """Return the ids of these rows, (n,) utf8, in their order; consecutive ones over the files' maps."""
        rows = self.numbers(rows)
        found = []
        for shard, own in self.by_shard(rows):
            column, local = map_batch(self._files[shard], "clip_id")["clip_id"], rows[own] - self._starts[shard]
            together = len(local) == local[-1] - local[0] + 1 and bool((np.diff(local) == 1).all())
            found.append(column.slice(local[0], len(local)) if together else column.take(pa.array(local)))
        return pa.chunked_array(found, pa.string())

    def by_shard(self, rows: np.ndarray) -> list[tuple[int, slice]]:
        """Return the runs of `rows` that lie in one shard: its number, and where in `rows`."""
        shard = self._shard(rows)
        edges = np.flatnonzero(np.diff(shard)) + 1
        starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(rows)]
        return [(int(shard[start]), slice(start, end)) for start, end in zip(starts, ends, strict=True) if start < end]

    def index_of(self, ids: Sequence[str] | np.ndarray | pa.ChunkedArray) -> np.ndarray:
        """Return the rows (len(ids),) int64 of the clips `ids`. Raises UserError for clips that the store lacks."""
        wanted = ids if isinstance(ids, pa.ChunkedArray) else pa.array(ids, pa.string())
        found = pc.index_in(wanted, value_set=self.keys())
        if found.null_count:
            missing = wanted.filter(found.is_null()).slice(0, 3).to_pylist()
            raise UserError(f"{self.folder}: holds no clip {', '.join(missing)} ({found.null_count} missing)")
        return found.to_numpy().astype(np.int64)

    def located(self, rows: np.ndarray) -> tuple[list[Path], np.ndarray, np.ndarray]:
        """Return the files, shards or indexes, of these rows, and each row's file and place in it, (n,) int64."""
        shards, of = np.unique(self._shard(rows), return_inverse=True)
        return [self._files[shard] for shard in shards], of, rows - self._starts[shards[of]]

    def pcm(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return (B, 32000) int16 of the given rows in the given order, in `out` where given."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of a store of {len(self)} clips")
        if out is None:
            out = np.empty((len(indices), CLIP_SAMPLES), dtype=np.int16)
        if self._shards is None and not self._whole:
            read_samples(*self.located(indices), out)
            return out
        if self._shards is None:
            self._shards = stored_files(self.folder, f"{SHARD}-*.arrow")
        shard = self._shard(indices)
        for position, (s, row) in enumerate(zip(shard.tolist(), indices.tolist(), strict=True)):
            if s not in self._pcm:
                self._pcm[s] = map_pcm(self._shards[s])
            out[position] = self._pcm[s][row - self._starts[s]]
        return out

    def _shard(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1


@dataclass(frozen=True)
class Ids:
    """The ids of a store's clips, read from its files when they are asked for; an index gives those of some clips."""

    store: ClipStore

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    def __getitem__(self, rows: Any) -> Any:
        rows = self.store.numbers(rows)
        found = self.store.keys(np.atleast_1d(rows)).to_numpy()
        return found if rows.ndim else found[0]


def map_pcm(file: Path) -> np.ndarray:
    """Return a shard's samples (n, 32000) int16 over its memory map. Raises UserError where it is damaged."""
    return map_batch(file, "pcm")["pcm"].flatten().to_numpy().reshape(-1, CLIP_SAMPLES)


class _Codes:
    """A column of several shards, whose dictionaries differ, on its way to Names."""

    def __init__(self, codes: np.ndarray) -> None:
        self._codes, self._numbers = codes, dict[str, int]()

    def fill(self, rows: slice, column: pa.DictionaryArray) -> None:
        own = [self._numbers.setdefault(name, len(self._numbers)) for name in column.dictionary.to_pylist()]
        self._codes[rows] = np.array(own, dtype=self._codes.dtype)[column.indices.to_numpy()]

    def names(self, clips: int) -> Names:
        return Names(self._codes[:clips], np.array(list(self._numbers), dtype=str))
