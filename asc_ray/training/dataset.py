"""What a training sees of the clip store: clips by part, and impulse responses."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from asc_ray.artifacts import stored_file
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.data.batches import MAPPED, Stream, Waves
from asc_ray.data.clips import ClipStore, open_clips
from asc_ray.data.config import DataConfig, FusionData, PartitionConfig
from asc_ray.data.division import check_held_out_devices, partition
from asc_ray.data.mirror import mirrored
from asc_ray.data.recordings import cut_following, following

IMPULSE_RESPONSES = "impulse_responses.safetensors"


@dataclass(frozen=True)
class Source:
    """Where a training's clips are, how they are divided into parts, and how they are delivered.

    `fusion_data` and `folds` are those of FusionConfig. In cross-fitting, `fold` is the fold that a teacher does not
    see. Nothing is trained on clips of the `held_out_devices`: on the validation part they stand for unseen devices.
    """

    clips: Path
    parts: PartitionConfig
    delivery: DataConfig = MAPPED
    stream: Stream | None = None
    fusion_data: FusionData = "holdout"
    folds: int = 4
    fold: int | None = None
    held_out_devices: tuple[str, ...] = ()

    def store(self) -> ClipStore:
        return open_clips(self._local(), whole=self.delivery.mode != "stream")

    def open(self, test: bool = False) -> "Dataset":
        """Open the clip store and divide it into parts; only what reports on the part `test` asks for it."""
        store = self.store()
        train = np.flatnonzero(store.split == "train")
        shares = self.parts.shares(self.fusion_data, self.folds)
        divided = partition(store.scene[train], store.place.codes[train], store.labels, shares, self.parts.seed)
        parts = {part: train[indices] for part, indices in divided.items()}
        folds = tuple(parts.pop(name) for name in list(parts) if name.startswith("fold-"))
        if folds:
            seen = [rows for n, rows in enumerate(folds) if n != self.fold]
            parts["train"] = np.sort(np.concatenate(seen))
            parts["fusion"] = parts["train"] if self.fold is None else folds[self.fold]
        elif self.fusion_data == "train":
            parts["fusion"] = parts["train"]
        device = store.device
        check_held_out_devices(self.held_out_devices, device.among(train), device.among(parts["validation"]))
        held_out = device.isin(self.held_out_devices)
        for part in ("train", "fusion"):
            parts[part] = parts[part][~held_out[parts[part]]]
        if test:
            parts["test"] = np.flatnonzero(store.split == "test")
        bank = open_bank(stored_file(store.folder, IMPULSE_RESPONSES))
        return Dataset(store, parts, bank, self.delivery, self.stream, folds, self.held_out_devices)

    def _local(self) -> Path:
        return mirrored(self.clips, self.delivery.cache) if self.delivery.cache else self.clips


@dataclass(frozen=True)
class Dataset:
    """A clip store with its parts as index arrays: `train`, `fusion`, `validation`, and `test` where asked for.

    Teachers are trained on `train`, eq. 4 is learned on `fusion`. With cross-fitting, and with `fusion.data: train`,
    both are the training split without `validation`. Where the Source has a `fold`, `fusion` is that fold and `train`
    the others.
    """

    store: ClipStore
    parts: dict[str, np.ndarray]
    bank: ImpulseBank
    delivery: DataConfig = MAPPED
    stream: Stream | None = None
    folds: tuple[np.ndarray, ...] = ()  # only with cross-fitting
    held_out_devices: tuple[str, ...] = ()  # `train` and `fusion` have no clips of these

    def waves(self, rows: np.ndarray, device: torch.device, gpus: float = 1.0, crop: bool = False) -> Waves:
        """Return the waveforms of these rows; to be cropped, each with the second that follows it among the rows."""
        after = None
        if crop:
            store = self.store
            if store.recording is None or store.second is None:
                after = following(store.keys(rows), store.scene[rows], store.place.codes[rows])
            else:
                after = cut_following(store.recording.codes[rows], store.second[rows])
        return Waves(self.store, rows, device, self.delivery, self.stream, gpus, after)

    @property
    def mean_energy(self) -> float:
        """Return the mean energy of the training split, the `auto` threshold of ADIR (eq. 3)."""
        return float(self.store.energy[self.store.split == "train"].mean(dtype=np.float64))


def save_bank(bank: ImpulseBank, file: Path) -> None:
    """Write the impulse responses beside the clips, so that later stages need the clip store and not the corpus."""
    save_file({"responses": bank.responses}, file, metadata={"names": json.dumps(bank.names)})


def open_bank(file: Path) -> ImpulseBank:
    with safe_open(file, framework="pt") as stored:
        return ImpulseBank(tuple(json.loads(stored.metadata()["names"])), stored.get_tensor("responses"))
