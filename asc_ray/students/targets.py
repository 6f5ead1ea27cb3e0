"""What a student learns from: its clips, and their soft targets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asc_ray.artifacts import stored_files
from asc_ray.data.logits import Ensemble, read_logits
from asc_ray.errors import UserError
from asc_ray.training.dataset import Dataset


def student_clips(data: Dataset) -> np.ndarray:
    """Return every training clip outside the validation part."""
    return np.union1d(data.parts["train"], data.parts["fusion"])


@dataclass(frozen=True)
class TargetFiles:
    """The files of a finished artifact that hold the soft targets of the training split."""

    artifact: Path
    pattern: str


def read_soft_targets(data: Dataset, files: TargetFiles | None) -> np.ndarray | None:
    """Read the soft targets as logits (clips of the store, K) float32, joined by clip id; None without `files`.

    Clips that no student learns from may have NaN. Raises UserError where a student's clip has no soft target, and
    where the files are not as they were written.
    """
    if files is None:
        return None
    stored = read_logits(stored_files(files.artifact, files.pattern))
    soft = np.full((len(data.store), len(data.store.labels)), np.nan, dtype=np.float32)
    soft[data.store.index_of(stored.ids)] = Ensemble([stored], stored.ids).read()[0]
    clips = student_clips(data)
    missing = np.isnan(soft[clips]).any(axis=1)
    if missing.any():
        first = ", ".join(str(name) for name in data.store.ids[clips[missing]][:5])
        raise UserError(
            f"{files.artifact}: {missing.sum()} training clips have no soft target, first {first}; fuse again"
        )
    return soft
