"""What a student learns from: its clips, and their soft targets."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asc_ray.artifacts import stored_files
from asc_ray.data.logits import Logits, read_logits
from asc_ray.errors import UserError

if TYPE_CHECKING:  # a plan names such files, and needs no torch for it
    from asc_ray.training.dataset import Dataset


def student_clips(data: "Dataset") -> np.ndarray:
    """Return every training clip outside the validation part, in the order of the store."""
    chosen = np.zeros(len(data.store), dtype=bool)
    chosen[data.parts["train"]] = chosen[data.parts["fusion"]] = True
    return np.flatnonzero(chosen)


@dataclass(frozen=True)
class TargetFiles:
    """The files of a finished artifact that hold the soft targets of the training split."""

    artifact: Path
    pattern: str


class SoftTargets:
    """The soft targets of a store's clips as logits, mapped from their files; an index gives those of some clips.

    `rows` (clips of the store,) are the clips' rows among the logits, -1 for a clip without one, whose logits are NaN.
    """

    def __init__(self, logits: Logits, rows: np.ndarray) -> None:
        self._logits, self._rows = logits, rows

    def __reduce__(self):
        return SoftTargets, (self._logits, self._rows)  # the other end maps the files itself

    @cached_property
    def _values(self) -> list[np.ndarray]:
        return [self._logits.values(file) for file in range(len(self._logits.files))]

    def __getitem__(self, clips: np.ndarray) -> np.ndarray:
        """Return the logits (len(clips), K) float32."""
        rows = self._rows[clips]
        out = np.full((len(rows), len(self._logits.labels)), np.nan, dtype=np.float32)
        of = np.searchsorted(self._logits.starts, rows, side="right") - 1
        for file in np.unique(of[rows >= 0]):
            own = np.flatnonzero((of == file) & (rows >= 0))
            out[own] = self._values[file][rows[own] - self._logits.starts[file]]
        return out


def read_soft_targets(data: "Dataset", files: TargetFiles | None) -> SoftTargets | None:
    """Return the soft targets as logits by the store's clips, joined by clip id; None without `files`.

    Clips that no student learns from may have NaN. Raises UserError where a student's clip has no soft target or one
    that is not finite, and where the files are not as they were written.
    """
    if files is None:
        return None
    store, stored = data.store, read_logits(stored_files(files.artifact, files.pattern))
    clips = np.flatnonzero(store.split == "train")
    if not stored.holds(store, clips):  # another order, or not all: their ids are joined in memory
        clips = store.index_of(stored.keys)
        if twice := len(clips) - len(np.unique(clips)):
            raise UserError(f"{files.artifact}: {twice} clips have a second soft target; fuse again")
    rows = np.full(len(store), -1, dtype=np.int32)
    rows[clips] = np.arange(len(stored), dtype=np.int32)
    asked = student_clips(data)
    if len(missing := asked[rows[asked] < 0]):
        first = ", ".join(store.ids[missing[:5]])
        raise UserError(
            f"{files.artifact}: {len(missing)} training clips have no soft target, first {first}; fuse again"
        )
    for file, path in enumerate(stored.files):
        if not np.isfinite(stored.values(file)).all():
            raise UserError(f"{path}: soft targets that are not finite; fuse again")
    return SoftTargets(stored, rows)
