"""Measure how time and memory grow with clips, shards, files, tasks and trials, and print the slopes.

    python bench/scale.py [--only clips shards files tasks trials] [--most 10000] [--clips 10000 ... 17000000]

A slope is that of the logarithms over the last two sizes: 1 means that twice as much takes twice as long, 0 that it
takes as long as before. Shards, files, tasks and trials go from 100 to --most in steps of ten. The clips are made up:
names, scenes, places and devices as TAU22's, 90 clips a place, and samples that are holes in sparse files, which read
as zeros and take no disk. Each size of them has processes of its own, whose peak memory is told:

plan     a kept reading is found valid, and the configuration `tau22` checked against it
open     the clip store is opened
train    a student trains --steps steps of its first epoch on all clips, with soft targets; the time is that before them
stream   as many batches are read by Ray Data: the process that asks, and the largest of those that read
"""

import argparse
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from memory import peak_memory

from asc_ray.artifacts import Artifact, _node_memory, _stamp, stored_files
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.cluster.tasks import Task, run_tasks
from asc_ray.config.asked import check_corpus
from asc_ray.config.composition import load_config
from asc_ray.data import reading
from asc_ray.data.clips import CLIP_SAMPLES, SAMPLE_RATE, SHARD, SHARD_CLIPS, SPLITS, ClipStore, open_clips
from asc_ray.data.config import DataConfig, PartitionConfig
from asc_ray.data.division import grouped
from asc_ray.data.logits import write_logits
from asc_ray.data.pieces import finished_pieces, note_piece, piece_file
from asc_ray.data.samples import write_index
from asc_ray.models.registry import build
from asc_ray.resources import Resources
from asc_ray.search.config import SweepConfig
from asc_ray.search.course import Course
from asc_ray.search.trials import TrialResult
from asc_ray.students.config import Limits
from asc_ray.students.targets import TargetFiles, read_soft_targets
from asc_ray.students.train import fit_student
from asc_ray.training.dataset import IMPULSE_RESPONSES, Source, save_bank

SCENES, DEVICES = [f"scene{n}" for n in range(10)], ["a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6"]
CLIPS_A_PLACE, TRAINING = 90, 0.82  # of TAU22
SPACE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}, "augment.freq_mixstyle.p": {"uniform": [0.0, 0.8]}}


def columns(first: int, end: int, clips: int) -> dict[str, np.ndarray]:
    """Return scene, place, device and split of the clips from `first` to `end` of so many, as numbers."""
    index = np.arange(first, end)
    place, test = index // CLIPS_A_PLACE, index >= TRAINING * clips
    return {"scene": place % 10, "place": place, "device": index % np.where(test, 9, 6), "split": test.astype(int)}


class Sparse(io.FileIO):
    """A file in which what is large is left out: a hole, which reads as zeros."""

    def write(self, data) -> int:
        if len(data) < 1 << 20:
            return super().write(data)
        self.truncate(self.seek(len(data), io.SEEK_CUR))
        return len(data)


def write_shard(file: Path, first: int, end: int, clips: int, samples: int = CLIP_SAMPLES) -> None:
    """Write a shard as `write_clips` does, with clips of zeros."""
    own = columns(first, end, clips)
    places, location = np.unique(own["place"], return_inverse=True)
    names = [f"place-{number:09d}" for number in places]
    ids = [f"audio/{SCENES[s]}-lisbon-{p}-{i}-0-{DEVICES[d]}.wav" for i, s, p, d in
           zip(range(first, end), own["scene"], own["place"], own["device"], strict=True)]  # fmt: skip

    def dictionary(codes: np.ndarray, vocabulary: Sequence[str]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(vocabulary, pa.string()))

    batch = pa.RecordBatch.from_pydict(
        {
            "clip_id": pa.array(ids, pa.string()),
            "scene": dictionary(own["scene"], SCENES),
            "device": dictionary(own["device"], DEVICES),
            "location": dictionary(location, names),
            "split": dictionary(own["split"], SPLITS),
            "energy": pa.array(np.random.default_rng(first).random(end - first, dtype=np.float32)),
            "pcm": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros((end - first) * samples, np.int16)), samples),
        },
        metadata={"labels": json.dumps(SCENES), "devices": json.dumps(DEVICES), "sample_rate": str(SAMPLE_RATE)}
        | {"corpus": "f00d"},
    )
    with Sparse(file, "w") as sparse, pa.PythonFile(sparse, "w") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    write_index(file, np.full(end - first, zlib.crc32(bytes(2 * samples)), np.uint32))


def make_store(storage: Path, clips: int) -> ClipStore:
    """Make a clip store, and note that this node has compared it: nobody reads a terabyte of holes for a checksum."""
    artifact = Artifact(storage, "clips", "made-up", f"{clips:016d}", {}, {})
    save_bank(ImpulseBank.load(None), artifact.open_partial() / IMPULSE_RESPONSES)
    for first in range(0, clips, SHARD_CLIPS):
        write_shard(piece_file(artifact.partial, SHARD, first), first, min(first + SHARD_CLIPS, clips), clips)
    files = sorted(artifact.partial.glob(f"{SHARD}-*.arrow"))
    artifact.finish({}, known={file.name: {"sha256": "0" * 64} for file in files})
    with _node_memory(artifact.path) as known:
        known |= {file.name: _stamp(artifact.path / file.name, {"sha256": "0" * 64}) for file in files}
    return open_clips(artifact.path)


def make_targets(storage: Path, store: ClipStore) -> TargetFiles:
    artifact = Artifact(storage, "fusion", "fusion", f"{len(store):016d}", {}, {})
    folder, train = artifact.open_partial(), np.flatnonzero(store.split == "train")
    about = {"system": "fused", "labels": json.dumps(store.labels), "corpus": store.corpus}
    for first in range(0, len(train), SHARD_CLIPS):
        rows = train[first : first + SHARD_CLIPS]
        soft = np.random.default_rng(first).standard_normal((len(rows), len(SCENES)), dtype=np.float32)
        write_logits(folder / f"train-{first:09d}.arrow", store.ids[rows], soft, about)
    artifact.finish({})
    return TargetFiles(artifact.path, "train-*")


def plan(storage: Path, clips: int, _: int) -> str:
    """Time what a plan does about the corpus: find the reading, see that nothing changed, check the configuration."""
    corpus = storage / "corpus"
    (corpus / "audio").mkdir(parents=True)
    config = load_config("tau22", [f"storage={storage}", f"corpus.path={corpus}"])
    own = columns(0, math.ceil(TRAINING * clips), clips)
    groups = tuple(grouped(own["scene"], own["place"]))
    stamps = {"tables": reading._tables(config.corpus), "audio": {"audio": reading._stamp(corpus / "audio")}}
    made = reading.Reading(
        "f00d", tuple(SCENES), tuple(DEVICES), groups, (63,) * len(groups), True, "audio/x.wav", stamps
    )
    reading.keep(storage, config.corpus, made)
    start = time.perf_counter()
    found = reading.kept_reading(storage, config.corpus)
    assert found is not None
    check_corpus(config, found)
    return f"{time.perf_counter() - start:.3f}"


def opened(storage: Path, clips: int, _: int) -> str:
    start = time.perf_counter()
    open_clips(next((storage / "clips").iterdir()))
    return f"{time.perf_counter() - start:.3f}"


class Enough(Exception):
    """Raised when a training has made its steps."""


def train(storage: Path, clips: int, steps: int) -> str:
    """Time a training until it asks for its first batch."""
    start, asked = time.perf_counter(), []

    def first_batches(store: ClipStore, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        asked.append(time.perf_counter())
        for step, rows in enumerate(batches):
            if step == steps:
                raise Enough
            yield store.pcm(rows)

    torch.set_num_threads(1)
    source = Source(next((storage / "clips").iterdir()), PartitionConfig(), DataConfig(mode="stream"), first_batches)
    data = source.open()
    student = load_config("demo", []).student
    soft = read_soft_targets(data, TargetFiles(next((storage / "fusion").iterdir()), "train-*"))
    model = build(student.model, len(SCENES), 0)
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        fit_student(model, student, data, soft, Path(folder), 0.0, lambda metrics: None)
    return f"{asked[0] - start:.3f}"


def stream(storage: Path, clips: int, steps: int) -> str:
    import ray

    from asc_ray.cluster.stream import stream as streamed

    store = open_clips(next((storage / "clips").iterdir()), whole=False)
    rng = np.random.default_rng(0)
    ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    start = time.perf_counter()
    read = sum(len(pcm) for pcm in streamed(store, (rng.integers(0, clips, 64) for _ in range(steps))))
    assert read == 64 * steps
    seconds = time.perf_counter() - start
    largest = max(peak for name, peak in _below(os.getpid()) if name.startswith("ray::"))
    ray.shutdown()
    return f"{seconds:.3f} {largest:.2f}"


def _below(process: int) -> Iterator[tuple[str, float]]:
    """Yield name and peak memory in GB of the processes that a process has started, and of theirs."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        for child in (thread / "children").read_text().split():
            status = dict(re.findall(r"(\w+):\s+(.*)", Path(f"/proc/{child}/status").read_text()))
            yield status["Name"], int(status.get("VmHWM", "0 kB").split()[0]) / 1e6
            yield from _below(int(child))


MEASURED: dict[str, Callable[[Path, int, int], str]] = {"plan": plan, "open": opened, "train": train, "stream": stream}


def bench_clips(sizes: Sequence[int], steps: int) -> None:
    print("clips       " + "".join(f"{what:>26}" for what in MEASURED) + "   (s, GB)")
    found: dict[str, list[tuple[float, float]]] = {what: [] for what in MEASURED}
    for clips in sizes:
        with tempfile.TemporaryDirectory() as folder:
            tempfile.tempdir = folder  # for what a node remembers of the files that it has compared
            make_targets(Path(folder), make_store(Path(folder), clips))
            line = f"{clips:<12,}"
            for what in MEASURED:
                command = [sys.executable, __file__, "--steps", str(steps), "--one", what, folder, str(clips)]
                told = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": folder}
                )
                seconds, *memory = told.stdout.splitlines()[-1].split()
                found[what].append((float(seconds), float(memory[-1])))
                line += f"{seconds:>12} s {' '.join(memory):>10} GB"
            print(line, flush=True)
        tempfile.tempdir = None
    for what, own in found.items():
        times, peaks = zip(*own, strict=True)
        print(f"{what:8} slope of time {slope(sizes, times)}, of memory {slope(sizes, peaks)}")


def bench_shards(count: int, folder: Path) -> dict[str, float]:
    ids = [f"audio/{i}.wav" for i in range(count)]
    for first in range(count):
        write_shard(piece_file(folder, SHARD, first), first, first + 1, count, samples=CLIP_SAMPLES)
        note_piece(piece_file(folder, SHARD, first), ids[first : first + 1], {})
    return {
        "opened as a store": timed(lambda: ClipStore(folder)),
        "found finished": timed(lambda: finished_pieces(folder, SHARD, ids)),
    }


def bench_files(count: int, folder: Path) -> dict[str, float]:
    artifact = Artifact(folder, "files", "files", f"{count:016d}", {}, {})
    for number in range(count):
        (artifact.open_partial() / f"{number}").write_bytes(b"x")
    return {
        "finished": timed(lambda: artifact.finish({})),
        "complete": timed(lambda: artifact.complete),
        "checked": timed(lambda: stored_files(artifact.path)),
    }


def nothing() -> dict[str, int]:
    return {}


def bench_tasks(count: int, folder: Path) -> dict[str, float]:
    tasks = [Task(str(number), nothing, (), Resources()) for number in range(count)]
    return {"run": timed(lambda: run_tasks(tasks, 0, lambda *_: None, lambda *_: None))}


def bench_trials(count: int, folder: Path) -> dict[str, float]:
    """Time one more trial, from its proposal to its end, when so many have ended."""
    rng = np.random.default_rng(0)
    ended = [
        TrialResult(
            number=number, parameters={"optimizer.learning_rate": 10 ** rng.uniform(-4, -2)}
            | {"augment.freq_mixstyle.p": rng.uniform(0, 0.8)}, state="complete", curve=rng.random(4).tolist(),
        )
        for number in range(count)
    ]  # fmt: skip
    found = {}
    for sampler in ("random", "tpe"):
        sweep = SweepConfig.model_validate({"trials": count + 8, "epochs": 4, "space": SPACE, "sampler": sampler})
        student = load_config("demo", []).student
        course = Course(sweep, student, Limits(), len(SCENES), folder, list(ended), lambda *_: None)
        course._counted(student)  # once a search

        def one(course: Course = course) -> None:
            trial = course.start()
            assert trial is not None
            for epoch in range(1, 5):
                course.hear(trial["number"], {"epoch": epoch, "objective": 1.0})
            course.close(trial["number"], failed=False)

        found[f"one more, {sampler}"] = min(timed(one) for _ in range(3))
    return found


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def slope(sizes: Sequence[int], values: Sequence[float]) -> str:
    if len(sizes) < 2:
        return "unknown"
    return f"{math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2]):.2f}"


CURVES = {"shards": bench_shards, "files": bench_files, "tasks": bench_tasks, "trials": bench_trials}


def bench(name: str, most: int) -> None:
    import ray

    sizes = [10**power for power in range(2, 1 + round(math.log10(most)))]
    found: dict[str, list[float]] = {}
    if name == "tasks":
        ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
        bench_tasks(10, Path())  # starts the workers
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for what, seconds in CURVES[name](size, Path(folder)).items():
                found.setdefault(what, []).append(seconds)
    for what, own in found.items():
        times = "  ".join(f"{size:,}: {seconds:.3g} s" for size, seconds in zip(sizes, own, strict=True))
        print(f"{name:7} {what:18} {times}  slope {slope(sizes, own)}", flush=True)
    if name == "tasks":
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["clips", *CURVES], default=["clips", *CURVES])
    parser.add_argument("--most", type=int, default=10_000)
    parser.add_argument("--clips", type=int, nargs="+", default=[10**4, 10**5, 10**6, 17 * 10**6])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, folder, clips = options.one
        told = MEASURED[what](Path(folder), int(clips), options.steps)
        print(told, f"{peak_memory():.2f}")
        return
    for name in CURVES:
        if name in options.only:
            bench(name, options.most)
    if "clips" in options.only:
        bench_clips(options.clips, options.steps)


if __name__ == "__main__":
    main()
