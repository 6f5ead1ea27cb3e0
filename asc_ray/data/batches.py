"""Which clips make which batch, and each training step's generator: functions of (seed, epoch, step, rank) only."""

import numpy as np
import torch

from asc_ray.data.clips import ClipStore

# The first word of every spawn key: the two streams never meet, whatever the other words are.
_ORDER, _STEP = 0, 1


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """This rank's pieces of an epoch's batches of the indices 0..count-1, every index once over all ranks.

    `batch_size` is the global batch: the batches do not depend on `world`, and rank r has every world-th index of
    each, from the r-th. All ranks have the same number of pieces and none is empty: a last batch smaller than `world`
    is joined to the one before. Pieces of one batch may differ by one index.
    """
    if not (0 <= rank < world <= min(batch_size, count)):
        raise ValueError(
            f"rank {rank} of {world} with batches of {batch_size} and {count} clips: some rank has no clip"
        )
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))).permutation(count)
    starts = np.arange(0, count, batch_size)
    if len(starts) > 1 and count - starts[-1] < world:
        starts = starts[:-1]
    return [batch[rank::world] for batch in np.split(order, starts[1:])]


def eval_batches(count: int, batch_size: int) -> list[np.ndarray]:
    """The indices 0..count-1 in order, in batches."""
    return np.split(np.arange(count), range(batch_size, count, batch_size))


def step_generator(seed: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """The CPU generator of one training step: a resumed run draws what an unbroken one would have drawn."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_STEP, epoch, step, rank))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def waves(store: ClipStore, indices: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """(B, 32000) float32 in [-1, 1) on `device`; int16 crosses the bus."""
    return torch.from_numpy(store.pcm(indices)).to(device).to(torch.float32).div_(32768)
