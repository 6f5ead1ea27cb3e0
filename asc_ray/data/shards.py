"""A shard of the clip store from recordings: the unit of work of the ingest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asc_ray.data.clips import CLIP_SAMPLES, write_clips
from asc_ray.data.corpus import Clip
from asc_ray.data.decode import BadAudio, decode
from asc_ray.data.faults import BadClip


@dataclass(frozen=True)
class ShardReport:
    notes: dict[str, int]  # how many clips were resampled, padded, ...
    bad: list[BadClip]  # left out


def write_shard(
    root: Path, clips: Sequence[Clip], labels: Sequence[str], devices: Sequence[str], file: Path, *, fingerprint: str
) -> ShardReport:
    """Decode `clips` of the corpus in `root` into one file of `write_clips`; the same input gives the same bytes.

    Bad clips are left out and reported; refusing them is the caller's.
    """
    pcm = np.empty((len(clips), CLIP_SAMPLES), dtype=np.int16)
    results = decode([root / clip.clip_id for clip in clips], pcm)
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
    write_clips(file, kept, pcm[: len(kept)], labels, devices, fingerprint)
    return ShardReport(dict(sorted(notes.items())), bad)
