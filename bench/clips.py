"""Time random access to the clip store: shuffled batches through the memory map, page cache warm, one core.

    python bench/clips.py CLIPS [--batch 256] [--runs 200]

CLIPS is a finished clip store. Every batch is drawn anew from the whole store. For comparison the program also times
the copy of one array of a batch's size, which no reader can beat by much.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np

from asc_ray.data.clips import CLIP_SAMPLES, ClipStore


def rates(function, arguments, clips: int) -> list[float]:
    found = []
    for argument in arguments:
        start = time.perf_counter()
        function(argument)
        found.append(clips / (time.perf_counter() - start))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    store = ClipStore(options.clips)
    for start in range(0, len(store), options.batch):  # into the page cache
        store.pcm(np.arange(start, min(start + options.batch, len(store))))
    rng = np.random.default_rng(0)
    rows = [rng.choice(len(store), options.batch, replace=False) for _ in range(options.runs)]
    out = np.empty((options.batch, CLIP_SAMPLES), dtype=np.int16)
    source = np.ones_like(out)
    print(f"{len(store)} clips, batches of {options.batch}, {options.runs} runs, one of {os.cpu_count()} cores")
    for name, found in {
        "shuffled batch": rates(store.pcm, rows, options.batch),
        "into a buffer": rates(lambda batch: store.pcm(batch, out), rows, options.batch),
        "plain copy": rates(lambda _: np.copyto(out, source), rows, options.batch),
    }.items():
        tenth = found[len(found) // 10]
        print(f"{name:15} median {statistics.median(found):8.0f} clips/s, nine in ten above {tenth:.0f}")


if __name__ == "__main__":
    main()
