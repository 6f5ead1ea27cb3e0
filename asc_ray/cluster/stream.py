"""Streaming of clips, for corpora larger than a node's disk: Ray Data reads the next batches while a step computes."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from asc_ray.data.clips import CLIP_SAMPLES, open_clips

READERS = 4
AHEAD = 4  # batches


def stream(folder: Path, batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the clips of each batch of rows, (B, 32000) int16, in order.

    `folder` is a clip store that every node can reach. The rows are chosen beforehand, so a streamed epoch has the same
    batches as a mapped one of the same seed, epoch and rank. Ray runs a task again if it dies.
    """
    if not batches:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    plan = ray.data.from_items([{"rows": rows} for rows in batches], override_num_blocks=len(batches))
    # Readers ask for no CPU, because trainings hold them all and a reader mostly waits for its disk.
    readers = ray.data.TaskPoolStrategy(size=READERS)
    pcm = plan.map_batches(partial(_read, folder), batch_size=1, num_cpus=0, compute=readers)
    waiting = iter(batches)
    wanted = len(next(waiting))
    held: list[np.ndarray] = []
    for block in pcm.iter_batches(batch_size=None, prefetch_batches=AHEAD):
        held.append(block["pcm"].reshape(-1, CLIP_SAMPLES))
        while held and sum(map(len, held)) >= wanted:
            together = held[0] if len(held) == 1 else np.concatenate(held)
            yield together[:wanted]
            held = [together[wanted:]] if len(together) > wanted else []
            wanted = len(next(waiting, ()))


_open = lru_cache(maxsize=1)(open_clips)  # a worker reads many batches


def _read(folder: Path, batch: Any) -> dict[str, np.ndarray]:
    return {"pcm": _open(folder).pcm(batch["rows"][0])}
