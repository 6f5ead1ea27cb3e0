"""Measure what a search costs beside the training of its trials: time, memory, and trials that share a process.

    python bench/sweep.py CLIPS [--trials 40] [--seconds 20] [--slots 2] [--only time|memory|shared]

CLIPS is a finished clip store (`storage/clips/NAME-KEY` of any run). Trials are students of size sm1 on labels alone.

time:   --trials trials of about --seconds, none stopped early, in slots of one CPU each. Training seconds are those of
        the epochs, as the loop counts them, with augmentation and validation. The rest of slots x wall time is the cost
        of the search: Tune, proposals, networks, opening clips, checkpoints, waiting.
memory: 1 and 8 trials at once: the processes' proportional set sizes (shared pages divided among their users), separate
        for the mapped clips, for Ray's shared memory, which has the soft targets, and for the rest.
shared: two trials as two processes of one thread, as two threads of one process, and one after the other in a process
        of two threads.
"""

import argparse
import json
import logging
import re
import tempfile
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from asc_ray.artifacts import Artifact
from asc_ray.cluster.sweep import run_sweep
from asc_ray.data.clips import ClipStore
from asc_ray.data.config import PartitionConfig
from asc_ray.data.logits import write_logits
from asc_ray.models.registry import build
from asc_ray.resources import Resources
from asc_ray.search.config import SweepConfig
from asc_ray.students.config import Limits, StudentConfig
from asc_ray.students.targets import TargetFiles
from asc_ray.students.train import fit_student
from asc_ray.training.config import DistillationConfig
from asc_ray.training.dataset import Source

STUDENT = StudentConfig.model_validate(
    {
        "model": {"name": "ds_flexinet", "size": "sm1"},
        "augment": {"roll": 4000, "freq_mixstyle": {"p": 0.4}},
        "optimizer": {"batch_size": 64},
        "distillation": {"soft_target": "none"},
    }
)
SPACE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}, "augment.freq_mixstyle.p": {"uniform": [0.0, 0.8]}}


def train(clips: Path, epochs: int, seed: int, threads: int = 1) -> float:
    """Train one student in this process, and return the seconds of an epoch."""
    torch.set_num_threads(threads)
    data = Source(clips, PartitionConfig()).open()
    recipe = STUDENT.model_copy(update={"optimizer": STUDENT.optimizer.scaled_to(epochs), "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        network = build(recipe.model, len(data.store.labels), seed)
        history = fit_student(network, recipe, data, None, Path(folder), 0.0, lambda metrics: None)
    return min(metrics["seconds"] for metrics in history)


def search(
    clips: Path, trials: int, epochs: int, slots: int, soft_targets: TargetFiles | None = None
) -> tuple[float, float, float]:
    """Run a search; return its wall time, all trials' training seconds, and the seconds until the first epoch ended."""
    sweep = SweepConfig.model_validate(
        {"trials": trials, "epochs": epochs, "scheduler": "none", "lookback": slots + 2, "space": SPACE}
    )
    target = "none" if soft_targets is None else "fused"
    student = STUDENT.model_copy(update={"distillation": DistillationConfig(soft_target=target)})
    seconds: list[float] = []
    first: list[float] = []
    start = time.perf_counter()

    def on_event(name: str, event: dict[str, Any]) -> None:
        if "epoch" in event:
            seconds.append(event["seconds"])
            first.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        artifact = Artifact(Path(folder), "sweep", "sweep", "0", {}, {})
        source = Source(clips, PartitionConfig())
        results = run_sweep(
            artifact, source, {target: soft_targets}, student, sweep, Limits(), Resources(), 0, on_event
        )
    assert all(result.state == "complete" for result in results), results
    return time.perf_counter() - start, sum(seconds), first[0]


def bench_time(clips: Path, trials: int, wanted: float, slots: int) -> None:
    epochs = max(1, round(wanted / train(clips, 3, 0)))
    ray.init(address="local", num_cpus=slots, logging_level=logging.ERROR, log_to_driver=False)
    search(clips, slots, 1, slots)  # fills the page cache with the workers' libraries, as on a running cluster
    wall, training, first = search(clips, trials, epochs, slots)
    ray.shutdown()
    beside = slots * wall - training
    print(f"{trials} trials of {training / trials:.1f} s ({epochs} epochs) in {slots} slots: {wall:.1f} s")
    print(f"  slots busy with training: {100 * training / (slots * wall):.1f} %")
    print(f"  beside training: {beside / trials:.2f} s a trial, with the start ({first:.1f} s to the first epoch)")


def memory() -> dict[str, int]:
    """Return the proportional set sizes of trials' processes, in bytes: clips, Ray's shared memory, the rest."""
    sizes = {"clips": 0, "shared": 0, "own": 0}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ImplicitFunc" not in (folder / "cmdline").read_bytes():
                continue
            mapped = "own"
            for line in (folder / "smaps").read_text().splitlines():
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    mapped = "clips" if line.endswith(".arrow") else "shared" if "plasma" in line else "own"
                elif line.startswith("Pss:"):
                    sizes[mapped] += 1024 * int(line.split()[1])
        except OSError:  # the process has ended
            continue
    return sizes


def bench_memory(clips: Path) -> None:
    """Compare the memory of 8 trials with the clip store, the soft targets, and 8 times one trial's own memory."""
    store = sum(file.stat().st_size for file in clips.glob("*.arrow"))
    opened = ClipStore(clips)
    rows, classes = np.flatnonzero(opened.split == "train"), len(opened.labels)
    about = {"system": "fused", "labels": json.dumps(opened.labels), "corpus": opened.corpus}
    soft = len(opened) * classes * 4
    print(f"clip store: {store / 1e6:.0f} MB, soft targets: {soft / 1e6:.2f} MB")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        fusion = Artifact(Path(folder), "fusion", "made-up", "0" * 16, {}, {})
        file = fusion.open_partial() / "train-0.arrow"
        write_logits(file, opened.ids[rows], np.zeros((len(rows), classes), np.float32), about)
        fusion.finish({})
        for trials in (1, 8):
            ray.init(address="local", num_cpus=trials, logging_level=logging.ERROR, log_to_driver=False)
            seen, stop = [memory()], threading.Event()

            def watch(seen: list[dict[str, int]] = seen, stop: threading.Event = stop) -> None:
                while not stop.wait(0.5):
                    seen.append(memory())

            watcher = threading.Thread(target=watch)
            watcher.start()
            search(clips, trials, 2, trials, TargetFiles(fusion.path, "train-*"))
            stop.set()
            watcher.join()
            ray.shutdown()
            found[trials] = max(seen, key=lambda sizes: sum(sizes.values()))
            shown = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found[trials].items())
            print(f"{trials} at once: {shown}", flush=True)
    bound = store + soft + 8 * found[1]["own"]
    share = sum(found[8].values()) / bound
    print(f"8 at once: {100 * share:.0f} % of the store, the soft targets and 8 times one trial's own")


def bench_shared(clips: Path, wanted: float) -> None:
    epochs = max(1, round(wanted / train(clips, 3, 0)))
    pools: dict[str, tuple[Executor, int]] = {
        "two processes of one thread": (ProcessPoolExecutor(2, mp_context=get_context("spawn")), 1),
        "two threads of one process": (ThreadPoolExecutor(2), 1),
        "one after the other, two threads": (ThreadPoolExecutor(1), 2),
    }
    for name, (pool, threads) in pools.items():
        with pool:
            for run in [pool.submit(train, clips, 1, seed, threads) for seed in range(2)]:
                run.result()  # wait until the processes have started
            start = time.perf_counter()
            for run in [pool.submit(train, clips, epochs, seed, threads) for seed in range(2)]:
                run.result()
            print(f"two trials, {name}: {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--only", choices=("time", "memory", "shared"))
    options = parser.parse_args()
    if options.only in (None, "time"):
        bench_time(options.clips, options.trials, options.seconds, options.slots)
    if options.only in (None, "memory"):
        bench_memory(options.clips)
    if options.only in (None, "shared"):
        bench_shared(options.clips, options.seconds)


if __name__ == "__main__":
    main()
