"""Run the pipeline at TAU22's full shape: 169,300 clips under TAU22's own names, twelve teachers, one epoch of each.

    python bench/tau22_shape.py FOLDER [--clips 169300]

FOLDER must not exist: `FOLDER/corpus` takes 132 kB a clip, `FOLDER/storage` 64 kB, 33 GB at the full shape; whoever
is done removes it. The corpus has TAU22's tables, split, devices and file form (44.1 kHz, 24 bits, mono), meta.csv's
rows of clips in neither split included. Each listed clip is a second of the demo's, rotated by an amount of its own,
because the reader takes no file under two names; the files of unlisted clips are links to one.

The ingest is killed half-way and started again. Then each stage of bench/tau22_shape.yaml runs by its own command,
which ends at once where it is repeated. For every command the bench prints its time, the peak memory of the driver and
of the largest process that it started, and the largest sum of all (each page once: proportional set sizes).
"""

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from chaos import descendants, environment, kill
from memory import peak_memory

from asc_ray.data.config import DemoConfig
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.layouts import META_COLUMNS

CONFIG = Path(__file__).with_suffix(".yaml")
STAGES = ("teachers", "logits", "fuse", "student", "qat", "evaluate", "report")
CLIPS = 169_300
# Recordings of ten seconds in TAU22's development set by device: in fold1_train.csv, in fold1_evaluate.csv, in neither.
RECORDINGS = {
    "a": (10_215, 330, 3_855),
    "b": (749, 329, 0),
    "c": (748, 329, 0),
    "s1": (750, 330, 0),
    "s2": (750, 330, 0),
    "s3": (750, 330, 0),
    "s4": (0, 330, 750),
    "s5": (0, 330, 750),
    "s6": (0, 330, 750),
}
SPLITS = ("train", "evaluate", "neither")
SCENES = (
    *("airport", "bus", "metro", "metro_station", "park"),
    *("public_square", "shopping_mall", "street_pedestrian", "street_traffic", "tram"),
)
CITIES = ("barcelona", "helsinki", "lisbon", "london", "lyon", "milan", "paris", "prague", "stockholm", "vienna")
PLACES = (3, 1, 3)  # of a scene in a city, by split: no place is in two splits
RATE = 44_100


@dataclass(frozen=True)
class Row:
    """One clip as TAU22 names it."""

    scene: str
    place: str
    recording: int
    second: int
    device: str

    @property
    def name(self) -> str:
        return f"audio/{self.scene}-{self.place}-{self.recording}-{self.second}-{self.device}.wav"


def rows(clips: int) -> dict[str, list[Row]]:
    """Return about `clips` clips of the two splits, and those in neither, with TAU22's shares of the devices.

    Recordings have TAU22's ten seconds, below 20,000 clips one, so that every scene is on every device. The same
    second is recorded by several devices, as there.
    """
    seconds = 10 if clips >= 20_000 else 1
    found: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for device, counts in RECORDINGS.items():
        for part, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
            for number in range(round(count * clips * 10 / CLIPS / seconds)):
                scene, city = SCENES[number % 10], CITIES[number // 10 % 10]
                place = 10 * SCENES.index(scene) + sum(PLACES[:part]) + number // 100 % PLACES[part]
                recording = 100_000 * part + number
                found[split] += [Row(scene, f"{city}-{place}", recording, at, device) for at in range(seconds)]
    return found


def make_corpus(out: Path, clips: int) -> int:
    """Write the corpus into the new folder `out`, and return how many clips its splits list."""
    made = out.with_name("seconds")
    make_demo_corpus(made, DemoConfig(train_clips_per_scene=160, test_seconds_per_scene=16))
    pools = seconds_of(made)
    (out / "audio").mkdir(parents=True)
    (out / "evaluation_setup").mkdir()
    listed = rows(clips)
    header, rng = wav_header(), np.random.default_rng(0)
    for split in ("train", "evaluate"):
        for number, row in enumerate(listed[split]):
            pool = pools[split, SCENES.index(row.scene), row.device]
            sound, turn = pool[number % len(pool)], 3 * int(rng.integers(RATE))
            (out / row.name).write_bytes(header + sound[turn:] + sound[:turn])
    for row in listed["neither"]:
        (out / row.name).hardlink_to(out / listed["train"][0].name)
    every = [row for some in listed.values() for row in some]
    rng.shuffle(every)  # type: ignore[arg-type]
    table(out / "meta.csv", META_COLUMNS, [(row.name, row.scene, row.place, row.device) for row in every])
    for split in ("train", "evaluate"):
        lines = [(row.name, row.scene) for row in listed[split]]
        table(out / "evaluation_setup" / f"fold1_{split}.csv", ("filename", "scene_label"), lines)
    return len(listed["train"]) + len(listed["evaluate"])


def seconds_of(corpus: Path) -> dict[tuple[str, int, str], list[bytes]]:
    """Return the demo's seconds as 24-bit samples, by split, number of the scene, and device."""
    pools = defaultdict(list)
    scenes: dict[str, int] = {}
    for split in ("train", "evaluate"):
        for line in (corpus / "evaluation_setup" / f"fold1_{split}.csv").read_text().splitlines()[1:]:
            name, scene = line.split("\t")
            samples = sf.read(corpus / name, dtype="int32")[0].astype("<i4")
            device = name.removesuffix(".wav").rpartition("-")[2]
            key = split, scenes.setdefault(scene, len(scenes)), device
            pools[key].append(samples.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())
    return dict(pools)


def wav_header() -> bytes:
    """Return what stands before one second of 24-bit samples."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 3, RATE, RATE, "NONE", ""))
        written.writeframes(bytes(3 * RATE))
    return file.getvalue()[: -3 * RATE]


def table(file: Path, columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    file.write_text("".join("\t".join(line) + "\n" for line in (columns, *lines)))


@dataclass
class Watched:
    """What a command took."""

    seconds: float = 0.0
    driver: float = 0.0  # peak memory, GB
    largest: float = 0.0  # of the processes below it
    together: float = 0.0


def watch(process: subprocess.Popen) -> Watched:
    """Look at the process and those below it every five seconds until it ends."""
    found, start = Watched(), time.monotonic()
    while process.poll() is None:
        below = descendants(process.pid)
        with suppress(OSError):
            found.driver = max(found.driver, peak_memory(process.pid))
        for pid in below:
            with suppress(OSError):
                found.largest = max(found.largest, peak_memory(pid))
        found.together = max(found.together, sum(map(share, (process.pid, *below))))
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    found.seconds = time.monotonic() - start
    return found


def share(pid: int) -> float:
    """Return the process' proportional set size in GB; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1e6 if found else 0.0


class Bench:
    """Runs commands on one corpus and storage, and prints what each took."""

    def __init__(self, folder: Path, clips: int) -> None:
        self.folder, self.storage, self.log = folder, folder / "storage", folder / "log"
        self.clips = clips
        self.shard = min(4096, -(-clips // 8))

    def start(self, stage: str) -> subprocess.Popen:
        settings = (
            f"corpus.path={self.folder / 'corpus'}",
            f"corpus.shard_clips={self.shard}",
            f"storage={self.storage}",
        )
        words = [word for setting in settings for word in ("--set", setting)]
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "asc_ray.cli", stage, "--config", str(CONFIG), *words],
                stdout=out, stderr=out, env=environment(), start_new_session=True,
            )  # fmt: skip

    def run(self, stage: str, name: str = "", clips: int = 0) -> None:
        """Run a stage to its end. Raises SystemExit where it fails."""
        process = self.start(stage)
        found = watch(process)
        if process.returncode:
            raise SystemExit(f"{stage} ended with {process.returncode}:\n{self.log.read_text()[-3000:]}")
        memory = f"{found.driver:7.2f} {found.largest:9.2f} {found.together:9.2f}"
        rate = f"   {clips} clips, {clips / found.seconds:.0f} clips/s" if clips else ""
        print(f"{name or stage:22} {found.seconds:8.1f} {memory}{rate}", flush=True)

    def records(self) -> list[Path]:
        """Return the records of the finished shards of an ingest that has not ended."""
        return sorted(self.storage.glob("clips/*/shard-*.json"))

    def ingest(self) -> None:
        """Kill the ingest with all its processes half-way, start it again, and see that it kept the finished shards."""
        total = -(-self.clips // self.shard)
        start, process = time.monotonic(), self.start("ingest")
        while 2 * len(self.records()) < total:
            if process.poll() is not None:
                raise SystemExit(f"ingest ended before it was killed:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        for pid in (process.pid, *descendants(process.pid)):
            kill(pid, signal.SIGKILL)
        process.wait()
        seconds, records = time.monotonic() - start, self.records()
        kept = {record.with_suffix(".arrow").name for record in records}
        written = {file.name: file.stat().st_mtime_ns for file in self.storage.glob("clips/*/shard-*.arrow")}
        done = sum(json.loads(record.read_text())["clips"] for record in records)
        rate = f"{done} clips, {done / seconds:.0f} clips/s"
        print(f"{'ingest, killed':22} {seconds:8.1f} {'':27}   {rate}; {len(kept)} of {total} shards", flush=True)
        self.run("ingest", "ingest, again", self.clips - done)
        now = {file.name: file.stat().st_mtime_ns for file in self.storage.glob("clips/*/shard-*.arrow")}
        if again := [name for name in sorted(kept) if now.get(name) != written[name]]:
            raise SystemExit(f"{', '.join(again)}: the killed ingest had finished them, and they were made again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    start = time.monotonic()
    listed = make_corpus(options.folder / "corpus", options.clips)
    took = time.monotonic() - start
    print(f"{listed} clips in {options.folder / 'corpus'}, written in {took:.0f} s; {os.cpu_count()} cores", flush=True)
    print(f"{'':22} {'seconds':>8} {'driver':>7} {'a process':>9} {'all':>9}   GB at most")
    start = time.monotonic()
    bench = Bench(options.folder, listed)
    bench.ingest()
    for stage in STAGES:
        bench.run(stage)
    print(f"{'all of this':22} {time.monotonic() - start:8.1f}")
    bench.run("pipeline", "pipeline, all is done")
    (report,) = bench.storage.glob("report/*/report.html")
    print(f"report {report}")


if __name__ == "__main__":
    main()
