"""Streaming of clips, for corpora larger than a node's disk: Ray Data reads the next batches while a step computes."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from asc_ray.artifacts import stored_file
from asc_ray.data.clips import CLIP_SAMPLES, ClipStore, map_pcm
from asc_ray.data.samples import INDEX, read_samples

READERS = 4
AHEAD = 4  # batches
# Ray keeps a record of every batch that it is given, so an epoch is given to it in spans of so many.
SPAN = 1024


def stream(store: ClipStore, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the clips of each batch of the store's rows, (B, 32000) int16, in order.

    Every node can reach the store's storage, and a task reads the clips that it is asked for, and no shard as a whole.
    The rows are chosen beforehand, so a streamed epoch has the same batches as a mapped one of the same seed, epoch and
    rank. Ray runs a task again if it dies.
    """
    batches = iter(batches)
    while some := list(islice(batches, SPAN)):
        yield from _streamed(store, some)


def _streamed(store: ClipStore, batches: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    located = (store.located(rows) for rows in batches)
    places = [{"files": [*map(str, files)], "file": of, "row": rows} for files, of, rows in located]
    plan = ray.data.from_items(places, override_num_blocks=len(batches))
    # Readers ask for no CPU, because trainings hold them all and a reader mostly waits for its disk.
    readers = ray.data.TaskPoolStrategy(size=READERS)
    pcm = plan.map_batches(_read, batch_size=1, num_cpus=0, compute=readers)
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


_checked = cache(stored_file)  # a worker reads many batches


def _read(batch: Any) -> dict[str, np.ndarray]:
    names, of, rows = (batch[name][0] for name in ("files", "file", "row"))
    files = [_checked(file.parent, file.name) for file in map(Path, names)]
    pcm = np.empty((len(rows), CLIP_SAMPLES), dtype=np.int16)
    if files[0].suffix == INDEX:
        read_samples(files, of, rows, pcm)
        return {"pcm": pcm}
    for number, file in enumerate(files):  # of a store without indexes
        shard = map_pcm(file)  # anew each time: what stays mapped counts as memory
        for position in np.flatnonzero(of == number):
            pcm[position] = shard[rows[position]]
    return {"pcm": pcm}
