"""Compare ingest with librosa, per core: recordings decoded and resampled a second, and a worker's memory.

    pip install '.[bench]'; python bench/ingest.py AUDIO [--clips 600] [--runs 9]

AUDIO is a folder of one-second recordings. Both read the same files, in turns, in one process with one thread; the
figure is the ratio of each turn's times. Then the program writes one whole shard of 4,096 clips and prints the process'
peak memory, which does not grow with the corpus, because a shard is a worker's unit of work.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from memory import peak_memory

from asc_ray.data.clip import Clip
from asc_ray.data.clips import CLIP_SAMPLES, SAMPLE_RATE, SHARD, SHARD_CLIPS
from asc_ray.data.decode import BadAudio, decode
from asc_ray.data.pieces import note_piece, piece_file
from asc_ray.data.shards import write_shard


def recordings(folder: Path, count: int) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac", ".ogg"))
    if not files:
        sys.exit(f"{folder}: no *.wav, *.flac or *.ogg in it")
    return [files[i % len(files)] for i in range(count)]


def compare(files: list[Path], runs: int) -> None:
    import librosa

    out = np.empty((len(files), CLIP_SAMPLES), dtype=np.int16)

    def ours() -> None:
        bad = [result for result in decode(files, out) if isinstance(result, BadAudio)]
        assert not bad, bad[0]

    def theirs() -> None:
        for file in files:
            librosa.load(file, sr=SAMPLE_RATE, mono=True)

    def seconds(function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    seconds(ours), seconds(theirs)  # fill the page cache and make the filters
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    ratios = sorted(b / a for a, b in pairs)
    for name, times in zip(("asc-ray", "librosa"), zip(*pairs, strict=True), strict=True):
        rates = sorted(len(files) / t for t in times)
        print(f"{name:8} {statistics.median(rates):7.0f} clips/s, from {rates[0]:.0f} to {rates[-1]:.0f}")
    print(f"ratio    {statistics.median(ratios):7.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


def shard(folder: Path) -> None:
    files = recordings(folder, SHARD_CLIPS)
    clips = [Clip(str(file.relative_to(folder)), "scene", "a", "place", "train") for file in files]
    before = peak_memory()
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        file = piece_file(Path(out), SHARD, 0)
        write_shard(folder, clips, ["scene"], ["a"], file, fingerprint="")
        note_piece(file, [clip.clip_id for clip in clips], {})
        seconds = time.perf_counter() - start
    print(
        f"shard    {len(clips) / seconds:7.0f} clips/s into Arrow with its checksum; "
        f"peak memory {peak_memory():.2f} GB, of which {before:.2f} before"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", type=Path)
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.shard:
        shard(options.audio)
        return
    print(f"{options.clips} recordings, {options.runs} runs each, one thread of {os.cpu_count()} cores")
    compare(recordings(options.audio, options.clips), options.runs)
    # The shard has a process of its own, so that librosa's memory does not count.
    subprocess.run([sys.executable, __file__, str(options.audio), "--shard"], check=True)


if __name__ == "__main__":
    main()
