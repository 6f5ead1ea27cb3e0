"""What a training sees of the clip store: clips by part, impulse responses, soft targets joined by clip."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file

from asc_ray.artifacts import mirrored, stored_file, stored_files
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.data.batches import MAPPED, DataConfig, Stream, Waves
from asc_ray.data.clips import ClipStore, open_clips
from asc_ray.data.corpus import partition
from asc_ray.data.logits import Ensemble, read_logits
from asc_ray.errors import ConfigError
from asc_ray.fusion import FusionConfig
from asc_ray.section import Section

HOLDOUT = FusionConfig()
IMPULSE_RESPONSES = "impulse_responses.safetensors"


class PartitionConfig(Section):
    """Shares of the training clips, by place, that no teacher is trained on; the rest is the part `train`.

    `fusion` is where eq. 4 is learned, with `fusion.data: holdout`; `validation` selects and stops, and trains nothing
    at all.
    """

    fusion: float = Field(0.12, gt=0.0, lt=0.5, description="share of the part `fusion`")
    validation: float = Field(0.12, gt=0.0, lt=0.5, description="share of the part `validation`")
    seed: int = Field(0, ge=0, description="of the division")

    def shares(self, fusion: FusionConfig) -> dict[str, float]:
        """What `partition` takes out of the part `train`."""
        validation = {"validation": self.validation}
        if fusion.data == "holdout":
            return {"fusion": self.fusion} | validation
        if fusion.data == "crossfit":
            return {f"fold-{n}": (1 - self.validation) / fusion.folds for n in range(fusion.folds)} | validation
        return validation


@dataclass(frozen=True)
class SoftTargets:
    """Where soft targets of the training split are: files of a finished artifact."""

    artifact: Path
    pattern: str


@dataclass(frozen=True)
class Source:
    """Where a training's clips are, how they are divided into parts, and how they reach the device.

    `fold`: of a teacher that is trained for cross-fitting, the one of the folds that it does not see. `strangers`:
    devices whose clips are not trained on, so that on the validation part they stand for unseen ones.
    """

    clips: Path
    parts: PartitionConfig
    delivery: DataConfig = MAPPED
    stream: Stream | None = None
    fusion: FusionConfig = HOLDOUT
    fold: int | None = None
    strangers: tuple[str, ...] = ()

    def store(self) -> ClipStore:
        return open_clips(self._local())

    def open(self, test: bool = False) -> "Dataset":
        """The clips by part; the part `test` only where it is asked for, by what reports on it."""
        folder = self._local()
        store = open_clips(folder)
        train = np.flatnonzero(store.split == "train")
        rows = store.clips
        divided = partition([rows[i] for i in train], self.parts.shares(self.fusion), self.parts.seed)
        parts = {part: train[indices] for part, indices in divided.items()}
        folds = tuple(parts.pop(name) for name in list(parts) if name.startswith("fold-"))
        if folds:
            seen = [rows for n, rows in enumerate(folds) if n != self.fold]
            parts["train"] = np.sort(np.concatenate(seen))
            parts["fusion"] = parts["train"] if self.fold is None else folds[self.fold]
        elif self.fusion.data == "train":
            parts["fusion"] = parts["train"]
        check_strangers(self.strangers, store.device[train], store.device[parts["validation"]])
        strange = np.isin(store.device, self.strangers)
        for part in ("train", "fusion"):
            parts[part] = parts[part][~strange[parts[part]]]
        if test:
            parts["test"] = np.flatnonzero(store.split == "test")
        bank = open_bank(stored_file(folder, IMPULSE_RESPONSES))
        return Dataset(store, parts, bank, self.delivery, self.stream, folds, self.strangers)

    def _local(self) -> Path:
        return mirrored(self.clips, self.delivery.cache) if self.delivery.cache else self.clips


def check_strangers(strangers: Sequence[str], trained: Iterable[str], validated: Iterable[str]) -> None:
    """Raise ConfigError unless these devices have clips to validate on, and leave others to train on."""
    known = set(trained) & set(validated)
    if strangers and not set(strangers) < known:
        raise ConfigError(
            f"sweep.validation.devices: found {', '.join(strangers)}; allowed are some, and not all, of "
            f"{', '.join(sorted(map(str, known)))}, the devices of the training and the validation part"
        )


@dataclass(frozen=True)
class Dataset:
    """A clip store with its parts as index arrays: `train`, `fusion`, `validation`, and `test` where asked for.

    Teachers are trained on `train`, eq. 4 is learned on `fusion`. With cross-fitting, and with `fusion.data: train`,
    both are all of the training split but `validation`; but a Source with a `fold` has that fold in `fusion` and the
    others in `train`.
    """

    store: ClipStore
    parts: dict[str, np.ndarray]
    bank: ImpulseBank
    delivery: DataConfig
    stream: Stream | None
    folds: tuple[np.ndarray, ...] = ()  # of cross-fitting
    strangers: tuple[str, ...] = ()  # devices that `train` and `fusion` have no clips of

    def waves(self, rows: np.ndarray, device: torch.device, gpus: float = 1.0) -> Waves:
        return Waves(self.store, rows, device, self.delivery, self.stream, gpus)

    @property
    def mean_energy(self) -> float:
        """Mean energy of the training split: the `auto` threshold of ADIR (eq. 3)."""
        return float(self.store.energy[self.store.split == "train"].mean(dtype=np.float64))

    def soft_logits(self, targets: SoftTargets) -> np.ndarray:
        """Soft targets as (clips of the store, K) float32, joined by clip id; NaN where a clip has none.

        Raises UserError where their files are not as they were written.
        """
        soft = read_logits(stored_files(targets.artifact, targets.pattern))
        rows = self.store.index_of(soft.ids)
        values = np.full((len(self.store), len(self.store.labels)), np.nan, dtype=np.float32)
        values[rows] = Ensemble([soft], soft.ids).read()[0]
        return values


def save_bank(bank: ImpulseBank, file: Path) -> None:
    """Keep the impulse responses with the clips: later stages need the clip store and not the corpus."""
    save_file({"responses": bank.responses}, file, metadata={"names": json.dumps(bank.names)})


def open_bank(file: Path) -> ImpulseBank:
    with safe_open(file, framework="pt") as stored:
        return ImpulseBank(tuple(json.loads(stored.metadata()["names"])), stored.get_tensor("responses"))
