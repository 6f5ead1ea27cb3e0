"""Batches: which clips make which one, each training step's generator, and how a batch reaches the GPU or CPU.

A batch and what is drawn for it depend on (seed, epoch, step) alone: they are the same mapped, resident or streamed,
the same after a restart, and the same for any number of ranks.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from asc_ray.data.clips import CLIP_SAMPLES, ClipStore
from asc_ray.data.config import DataConfig
from asc_ray.errors import ConfigError

Mode = Literal["mapped", "resident", "stream"]
# Reads rows of a clip store, batch by batch, (B, 32000) int16 each; its files may be read by other nodes.
Stream = Callable[[ClipStore, Iterable[np.ndarray]], Iterator[np.ndarray]]


# The first word of every spawn key, so that the two random streams never meet, whatever the other words are.
_ORDER, _STEP = 0, 1


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, world: int = 1, shares: np.ndarray | None = None
) -> list[np.ndarray]:
    """Return an epoch's batches of the indices 0..count-1, each once; rank r of `world` reads `batch[r::world]`.

    With `shares` (count,), which add up to 1, index i occurs count x shares[i] times, rounded up or down by chance.
    No rank's piece is empty: a last batch smaller than `world` is joined to the one before. Otherwise the batches do
    not depend on `world`. Pieces of one batch may differ by one index. Raises ConfigError where a rank has no clip.
    """
    if not 1 <= world <= min(batch_size, count):
        raise ConfigError(
            f"{world} workers for batches of {batch_size} of {count} clips: some worker has no clip; use fewer workers"
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch)))
    order = rng.permutation(count)
    if shares is not None:  # systematic sampling: equal steps over the shares in a random order
        edges = np.cumsum(shares[order])
        steps = (np.arange(count) + rng.random()) * (edges[-1] / count)
        places = np.minimum(np.searchsorted(edges, steps, side="right"), count - 1)
        order = rng.permutation(order[places])
    starts = np.arange(0, count, batch_size)
    if len(starts) > 1 and count - starts[-1] < world:
        starts = starts[:-1]
    return np.split(order, starts[1:])


def device_shares(device: np.ndarray, balance: float) -> np.ndarray | None:
    """Return each clip's share of an epoch, proportional to its device's count to the power -balance; None for 0."""
    if balance == 0:
        return None
    _, of, counts = np.unique(device, return_inverse=True, return_counts=True)
    shares = counts[of] ** -balance
    return shares / shares.sum()


def eval_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """Return the indices 0..count-1 in order, in batches."""
    return np.split(np.arange(count), range(batch_size, count, batch_size))


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Return one training step's CPU generator, for all ranks: a resumed training draws what an unbroken one would."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_STEP, epoch, step))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


MAPPED = DataConfig(mode="mapped")


class Waves:
    """The waveforms of the store's clips `rows`, batch by batch, on `device`; with `gpus` below 1 on a part of it.

    With `after`, positions in `rows`, each clip brings that one along, behind its own samples.

    Raises ConfigError where `resident` is asked for and does not fit.
    """

    def __init__(
        self,
        store: ClipStore,
        rows: np.ndarray,
        device: torch.device,
        config: DataConfig = MAPPED,
        stream: Stream | None = None,
        gpus: float = 1.0,
        after: np.ndarray | None = None,
    ) -> None:
        self._store, self._rows, self._device, self._stream, self._after = store, rows, device, stream, after
        self.mode = delivery(config, len(rows), device, gpus)
        if self.mode == "stream" and stream is None:
            raise ConfigError("data.mode: stream needs a Ray cluster; allowed without: auto, mapped, resident")
        if self.mode == "resident":
            self._resident = torch.empty((len(rows), CLIP_SAMPLES), dtype=torch.int16, device=device)
            for part in eval_batches(len(rows), 4096):
                self._resident[part[0] : part[-1] + 1] = torch.from_numpy(store.pcm(rows[part]))

    def batches(self, batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Yield (B, 32000) int16 for each batch of positions in `rows`, (B, 64000) with `after`.

        `waveform` turns them into waves.
        """
        if (after := self._after) is not None:
            pairs = self._batches(np.concatenate([batch, after[batch]]) for batch in batches)
            yield from (torch.cat(pcm.chunk(2), dim=1) for pcm in pairs)
        else:
            yield from self._batches(batches)

    def _batches(self, batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
        if self.mode == "resident":
            for batch in batches:
                yield self._resident.index_select(0, moved(torch.from_numpy(batch), self._device))
            return
        rows = (self._rows[batch] for batch in batches)
        if self.mode == "stream" and self._stream is not None:
            read = self._stream(self._store, rows)
        else:
            read = map(self._store.pcm, rows)
        for pcm in read:
            yield moved(torch.from_numpy(pcm), self._device)


def waveform(pcm: Tensor) -> Tensor:
    """Convert (B, T) int16 to float32 in [-1, 1)."""
    return pcm.to(torch.float32).div_(32768)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device` without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def delivery(config: DataConfig, clips: int, device: torch.device, gpus: float = 1.0) -> Mode:
    """Return the mode that `config.mode` stands for with so many clips; with `gpus` below 1 others share the GPU.

    Raises ConfigError where `resident` is asked for and does not fit.
    """
    if config.mode in ("mapped", "stream"):
        return config.mode
    if config.mode == "auto" and device.type != "cuda":
        return "mapped"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free = min(free, int(total * min(1.0, gpus)))
    else:
        free = _free_memory()
    needed = clips * CLIP_SAMPLES * 2
    if needed <= free * config.resident_share:
        return "resident"
    if config.mode == "auto":
        return "mapped"
    raise ConfigError(
        f"data.mode: resident takes {needed / 1e9:.2f} GB for {clips} clips, and data.resident_share "
        f"{config.resident_share:g} of the {free / 1e9:.2f} GB free on {device} is too little; use auto, mapped or "
        "stream"
    )


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
