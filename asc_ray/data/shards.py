"""Shards: recordings become the files of a clip store, which are the ingest's units of work."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asc_ray.data.clip import Clip
from asc_ray.data.clips import CLIP_SAMPLES, SHARD, SHARD_CLIPS, write_clips
from asc_ray.data.corpus import Corpus
from asc_ray.data.decode import BadAudio, decode
from asc_ray.data.faults import BadClip
from asc_ray.data.pieces import piece_file


@dataclass(frozen=True)
class ShardReport:
    notes: dict[str, int]  # how many clips were resampled, padded, ...
    bad: list[BadClip]  # left out


def write_shard(
    root: Path, clips: Sequence[Clip], labels: Sequence[str], devices: Sequence[str], file: Path, *, fingerprint: str
) -> ShardReport:
    """Decode `clips` of the corpus in `root` into one file of `write_clips`; the same input gives the same bytes.

    Bad clips are left out and reported; the caller may refuse them.
    """
    pcm = np.empty((len(clips), CLIP_SAMPLES), dtype=np.int16)
    cut = any(clip.recording for clip in clips)
    results = decode([root / clip.file for clip in clips], pcm, [clip.second for clip in clips] if cut else None)
    notes: Counter[str] = Counter()
    kept: list[Clip] = []
    bad: list[BadClip] = []
    for row, (clip, result) in enumerate(zip(clips, results, strict=True)):
        if isinstance(result, BadAudio):
            bad.append(BadClip(clip.clip_id, str(result)))
            continue
        pcm[len(kept)] = pcm[row]
        notes.update(result)
        kept.append(clip)
    write_clips(file, kept, pcm[: len(kept)], labels, devices, fingerprint, cut)
    return ShardReport(dict(sorted(notes.items())), bad)


def write_store(corpus: Corpus, folder: Path, shard_clips: int = SHARD_CLIPS) -> list[BadClip]:
    """Decode the whole corpus into a clip store in `folder`, in this process; return the clips that were left out."""
    folder.mkdir(parents=True, exist_ok=True)
    bad: list[BadClip] = []
    for first in range(0, len(corpus.clips), shard_clips):
        some, file = corpus.clips[first : first + shard_clips], piece_file(folder, SHARD, first)
        report = write_shard(corpus.root, some, corpus.labels, corpus.devices, file, fingerprint=corpus.fingerprint)
        bad += report.bad
    return bad
