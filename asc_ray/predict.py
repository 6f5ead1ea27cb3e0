"""`asc-ray predict`: recordings of any format, rate, channel count and length to scenes, a second at a time."""

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf
import soxr

from asc_ray.errors import UserError
from asc_ray.runtime import Bundle

# A clip may be this much shorter than what the model takes: the rest is zeros, as in training.
LENGTH_TOLERANCE = 0.1
_BLOCK_SECONDS = 10  # read at a time: a file may hold hours
_BATCH = 32
# Suffixes of sound: what libsndfile reads, and what it does not, to be named as unreadable. A file without a header
# says neither rate nor format; it comes as a stream.
SOUND = {f".{name.lower()}" for name in sf.available_formats() if name != "RAW"} | {
    ".aac", ".aif", ".aifc", ".m4a", ".mp3", ".oga", ".opus", ".webm", ".wma",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Of one file: `probabilities` (seconds, labels); `pooled` (labels,), their mean."""

    file: str
    probabilities: np.ndarray

    @property
    def pooled(self) -> np.ndarray:
        return self.probabilities.mean(axis=0)


def files_in(paths: Iterable[Path]) -> tuple[list[tuple[str, Path]], Counter[str]]:
    """(name, file) of all recordings, in order, and how many files of folders are none by their suffix, by suffix.

    A file given is called as it was given, one of a folder by its path in it, where no other folder is given beside.
    Raises UserError for what is not there.
    """
    found: list[tuple[str, Path]] = []
    others: Counter[str] = Counter()
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            # What a link leads to may be gone: a file that cannot be read.
            for file in sorted(file for file in path.rglob("*") if file.is_file() or not file.exists()):
                if file.suffix.lower() in SOUND:
                    found.append((str(file.relative_to(path) if len(paths) == 1 else file), file))
                else:
                    others[file.suffix or file.name] += 1
        elif path.exists():
            found.append((str(path), path))
        else:
            raise UserError(f"{path}: no such file or folder")
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no sound file; known suffixes: {' '.join(sorted(SOUND))}")
    return found, others


def answer(bundle: Bundle, name: str, path: Path) -> Answer:
    """Raises UserError for a file that cannot be read, is cut short, is empty, or has samples that are not finite."""
    try:
        file = sf.SoundFile(os.fsencode(path))
    except _UNREADABLE as error:
        raise UserError(f"unreadable ({str(error).rpartition(': ')[2]})") from None
    with file:
        return Answer(name, np.concatenate(list(_answers(bundle, _blocks(file), file.samplerate, _BATCH))))


# libsndfile's own errors, and what soundfile raises for formats that it is told too little of.
_UNREADABLE = (sf.SoundFileError, OSError, TypeError, ValueError)


def _blocks(file: sf.SoundFile) -> Iterator[np.ndarray]:
    """All samples, (samples, channels) at a time; SoundFile.blocks would repeat some where the file ends too early."""
    read = 0
    while True:
        try:
            block = file.read(_BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)
        except _UNREADABLE as error:
            raise UserError(f"unreadable ({str(error).rpartition(': ')[2]})") from None
        if not len(block):
            break
        read += len(block)
        yield block
    if read < file.frames - LENGTH_TOLERANCE * file.samplerate:
        raise UserError(f"cut short: {read} of {file.frames} samples")


def live(bundle: Bundle, stream: BinaryIO, rate: int, channels: int) -> Iterator[np.ndarray]:
    """Probabilities (labels,) of each second of raw PCM (signed, 16 bits, little endian), as soon as it is there."""

    def blocks() -> Iterator[np.ndarray]:
        size = 2 * channels * max(1, rate // 50)  # small: what resampling holds back a little of is not to wait long
        while raw := stream.read(size):
            whole = len(raw) // (2 * channels) * channels
            if left := len(raw) - 2 * whole:
                print(f"asc-ray: {left} bytes at the stream's end are no whole sample; left out", file=sys.stderr)
            yield np.frombuffer(raw, "<i2", whole).reshape(-1, channels) / np.float32(32768)

    for probabilities in _answers(bundle, blocks(), rate, 1):
        yield from probabilities


def _answers(bundle: Bundle, blocks: Iterable[np.ndarray], rate: int, batch: int) -> Iterator[np.ndarray]:
    """Probabilities (up to `batch`, labels) of the seconds of a recording, given as blocks (samples, channels)."""
    waiting: list[np.ndarray] = []
    size = bundle.frontend.samples
    for wave in seconds(_resampled(_mono(blocks), rate, bundle.frontend.sample_rate), size):
        # To 16 bits, as the clips of the training.
        waiting.append(np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16))
        if len(waiting) == batch:
            yield bundle.probabilities(np.stack(waiting))
            waiting = []
    if waiting:
        yield bundle.probabilities(np.stack(waiting))


def _mono(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        if broken := int((~np.isfinite(block)).sum()):
            raise UserError(f"{broken} samples are not finite")
        yield block.mean(axis=1)


def _resampled(blocks: Iterable[np.ndarray], rate: int, target: int) -> Iterator[np.ndarray]:
    if rate == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def seconds(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The recording in pieces of `size` samples, so that all of it is heard but less than a tenth of a piece.

    What is left at the end comes with as much before it as makes it whole. A recording shorter than one piece is
    followed by zeros up to a tenth of it, and repeated where more is missing. Raises UserError for no samples.
    """
    last, rest = np.zeros(0, np.float32), np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) >= size:
            last, rest = rest[:size], rest[size:]
            yield last
    if len(last):
        if len(rest) >= LENGTH_TOLERANCE * size:
            yield np.concatenate([last, rest])[-size:]
    elif not len(rest):
        raise UserError("no samples")
    elif len(rest) >= (1 - LENGTH_TOLERANCE) * size:
        yield np.pad(rest, (0, size - len(rest)))
    else:
        yield np.resize(rest, size)


def _table(labels: tuple[str, ...], per_second: bool) -> Callable[[Answer], Iterator[str]]:
    width = max(map(len, labels))

    def lines(answer: Answer) -> Iterator[str]:
        best = int(answer.pooled.argmax())
        count = len(answer.probabilities)
        yield f"{labels[best]:<{width}}  {100 * answer.pooled[best]:5.1f} %  {count:5d} s  {answer.file}"
        if per_second:
            for second, own in enumerate(answer.probabilities):
                best = int(own.argmax())
                yield f"  {labels[best]:<{width}}  {100 * own[best]:5.1f} %  {second:5d} s"

    return lines


def _json_lines(labels: tuple[str, ...], per_second: bool) -> Callable[[Answer], Iterator[str]]:
    def named(probabilities: np.ndarray) -> dict[str, object]:
        values = {label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)}
        return {"scene_label": labels[int(probabilities.argmax())], "probabilities": values}

    def lines(answer: Answer) -> Iterator[str]:
        entry = {"filename": answer.file, "seconds": len(answer.probabilities), **named(answer.pooled)}
        if per_second:
            entry["per_second"] = [named(own) for own in answer.probabilities]
        yield json.dumps(entry)

    return lines


def _csv(labels: tuple[str, ...], per_second: bool) -> Callable[[Answer], Iterator[str]]:
    if per_second:
        raise UserError("--per-second: DCASE's output.csv has a line a file; choose --format table or jsonl")

    def lines(answer: Answer) -> Iterator[str]:
        row = io.StringIO()
        values = [f"{p:.6f}" for p in answer.pooled]
        csv.writer(row, delimiter="\t").writerow([answer.file, labels[int(answer.pooled.argmax())], *values])
        yield row.getvalue().rstrip()

    return lines


FORMATS = {"table": _table, "jsonl": _json_lines, "csv": _csv}


def predict_files(
    bundle: Bundle, paths: list[Path], form: str, per_second: bool, on_file: Callable[[int], None]
) -> None:
    """Print an answer for each recording; `on_file` hears how many there are, and then of each.

    Raises UserError at the end, naming every file that could not be read.
    """
    found, others = files_in(paths)
    lines = FORMATS[form](bundle.labels, per_second)
    on_file(len(found))
    if form == "csv":
        print("filename", "scene_label", *bundle.labels, sep="\t")
    bad: list[str] = []
    for name, path in found:
        try:
            print(*lines(answer(bundle, name, path)), sep="\n", flush=True)
        except UserError as error:
            bad.append(f"{name}: {error}")
        on_file(0)
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        print(f"asc-ray: left out, no sound by their suffix: {counts}", file=sys.stderr)
    if bad:
        raise UserError(f"{len(bad)} of {len(found)} files without an answer:\n  " + "\n  ".join(bad))


def predict_live(bundle: Bundle, stream: BinaryIO, rate: int, channels: int, form: str) -> None:
    """Print a line for each second of a stream of raw PCM. Raises UserError for a stream without a sample."""
    if form == "csv":
        raise UserError("--format csv: DCASE's output.csv has a line a file; choose table or jsonl for a stream")
    for second, probabilities in enumerate(live(bundle, stream, rate, channels)):
        best = int(probabilities.argmax())
        if form == "jsonl":
            values = {label: round(float(p), 6) for label, p in zip(bundle.labels, probabilities, strict=True)}
            print(
                json.dumps({"second": second, "scene_label": bundle.labels[best], "probabilities": values}), flush=True
            )
        else:
            width = max(map(len, bundle.labels))
            print(f"{second:5d} s  {bundle.labels[best]:<{width}}  {100 * probabilities[best]:5.1f} %", flush=True)
