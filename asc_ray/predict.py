"""`asc-ray predict`: name the scenes of recordings of any format, rate, channel count and length, by the second."""

import csv
import io
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile as sf
import soxr

from asc_ray.audio.recording import Recording, cancels, check_rate, check_scale
from asc_ray.errors import UserError
from asc_ray.shown import in_csv, path_in_csv, printable

# A recording may be this much shorter than the model's clip: the rest is zeros, as in training.
LENGTH_TOLERANCE = 0.1
_BLOCK_SECONDS = 10  # read at a time, because a file may hold hours
_BLOCK_SAMPLES = 1 << 24  # read at a time, at most, of all channels together
_BATCH = 32
# Suffixes of sound: those that libsndfile reads, and others, whose files are then named as unreadable. RAW is left out,
# because a file without a header says neither rate nor format; it comes as a stream.
SOUND = {f".{name.lower()}" for name in sf.available_formats() if name != "RAW"} | {
    ".aac", ".aif", ".aifc", ".m4a", ".mp3", ".oga", ".opus", ".webm", ".wma",
}  # fmt: skip


# The first bytes of streams that are containers and not plain samples.
CONTAINERS = {
    b"RIFF": "WAV", b"RIFX": "WAV", b"RF64": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF", b"ID3": "MP3",
    b"caff": "CAF", b".snd": "AU", b"\x1aE\xdf\xa3": "WebM",
}  # fmt: skip


class Clip(Protocol):
    """What a model hears at a time."""

    @property
    def sample_rate(self) -> int: ...
    @property
    def samples(self) -> int: ...


class Model(Protocol):
    """What answers: a Bundle, or the ensemble of a storage. It maps (N, samples) int16 to probabilities (N, labels)."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def frontend(self) -> Clip: ...
    def probabilities(self, waves: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Answer:
    """The answer for one file: `probabilities` (seconds, labels), their mean `pooled` (labels,), and a `note` on what
    was not heard as it is: a short recording that was padded, silence."""

    file: str
    probabilities: np.ndarray
    note: str = ""

    @property
    def pooled(self) -> np.ndarray:
        return self.probabilities.mean(axis=0)


def files_in(paths: Iterable[Path]) -> tuple[list[tuple[str, Path]], Counter[str]]:
    """Return (name, file) of all recordings, in order, and how many other files the folders hold, by suffix.

    A file is named by the path that was given; a file in a folder by its path in the folder, if that alone was given.
    Raises UserError for a path that is not there, and where there is no recording.
    """
    found: list[tuple[str, Path]] = []
    others: Counter[str] = Counter()
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            # A broken link is kept, so that it is named as unreadable.
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


def answer(model: Model, name: str, path: Path) -> Answer:
    """Answer for one recording. Raises BadAudio if it cannot be read, is cut short, is empty, or is not sound."""
    powers = np.zeros(2)  # of the mean of the channels, and of the channels
    heard = 0  # samples
    with Recording(path) as recording:

        def mono() -> Iterator[np.ndarray]:
            nonlocal heard
            for block in recording.blocks(min(_BLOCK_SECONDS * recording.rate, _BLOCK_SAMPLES // recording.channels)):
                check_scale(block)
                wave = block.mean(axis=1)
                heard += len(wave)
                powers[:] += wave @ wave, np.vdot(block, block) / recording.channels
                yield wave

        answers = list(_answers(model, mono(), recording.rate, _BATCH))
    probabilities, silent = (np.concatenate(parts) for parts in zip(*answers, strict=True))
    clip, notes = model.frontend.samples / model.frontend.sample_rate, []
    if (length := heard / recording.rate) < clip:
        how = "padded with zeros" if length >= (1 - LENGTH_TOLERANCE) * clip else "repeated"
        notes.append(f"{length:.2f} s long, {how} to {clip:g} s")
    if cancels(*powers):
        notes.append("its channels cancel each other when they are mixed down; the answer means little")
    elif silent.all():
        notes.append("silent; the answer means nothing")
    elif silent.any():
        notes.append(f"{silent.sum()} of {len(silent)} seconds are silent, and count like the others")
    return Answer(name, probabilities, "; ".join(notes))


def live(model: Model, stream: BinaryIO, rate: int, channels: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the probabilities (labels,) of each second of raw PCM (signed, 16 bits, little endian), as soon as it is
    there, and whether the second is silent.

    Raises UserError for an impossible rate, and for a stream that begins as a container does.
    """
    check_rate(rate)

    def blocks() -> Iterator[np.ndarray]:
        size = 2 * channels * max(1, rate // 50)  # 20 ms, because resampling holds back a little and the answer waits
        beginning = True
        while raw := stream.read(size):
            if beginning:
                _refuse_container(raw)
                beginning = False
            whole = len(raw) // (2 * channels) * channels
            if left := len(raw) - 2 * whole:
                print(f"asc-ray: {left} bytes at the stream's end are no whole sample; left out", file=sys.stderr)
            yield (np.frombuffer(raw, "<i2", whole).reshape(-1, channels) / np.float32(32768)).mean(axis=1)

    for probabilities, silent in _answers(model, blocks(), rate, 1):
        yield from zip(probabilities, silent.tolist(), strict=True)


def _refuse_container(raw: bytes) -> None:
    for start, form in CONTAINERS.items():
        if raw.startswith(start):
            raise UserError(
                f"-: standard input begins as {form} does, and raw PCM (signed, 16 bits, little endian) is expected. "
                "Give the file by its name, or convert it: ffmpeg -i - -f s16le -ar 32000 -ac 1 - | asc-ray predict "
                "BUNDLE -"
            )


def _answers(
    model: Model, blocks: Iterable[np.ndarray], rate: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the probabilities (up to `batch`, labels) of a recording's seconds, and which are silent (up to `batch`,).

    The recording comes as blocks (samples,).
    """
    size = model.frontend.samples
    # Rounded to 16 bits, as the training's clips are.
    waves = (
        np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)
        for wave in seconds(_resampled(blocks, rate, model.frontend.sample_rate), size)
    )
    while waiting := list(islice(waves, batch)):
        together = np.stack(waiting)
        yield model.probabilities(together), np.ptp(together, axis=1) == 0


def _resampled(blocks: Iterable[np.ndarray], rate: int, target: int) -> Iterator[np.ndarray]:
    if rate == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def seconds(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the recording in pieces of `size` samples; less than a tenth of a piece may be left out at its end.

    A longer rest is filled up with the samples before it. A recording shorter than one piece is padded with zeros if at
    most a tenth is missing, and repeated if more is. Raises UserError for no samples.
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
        yield f"{labels[best]:<{width}}  {100 * answer.pooled[best]:5.1f} %  {count:5d} s  {printable(answer.file)}"
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
        if answer.note:
            entry["note"] = answer.note
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
        label = in_csv(labels[int(answer.pooled.argmax())])
        csv.writer(row, delimiter="\t").writerow([path_in_csv(answer.file), label, *values])
        yield row.getvalue().rstrip()

    return lines


FORMATS = {"table": _table, "jsonl": _json_lines, "csv": _csv}


def predict_files(model: Model, paths: list[Path], form: str, per_second: bool, on_file: Callable[[int], None]) -> None:
    """Print an answer for each recording; `on_file` gets their number first, and then 0 after each.

    Raises UserError at the end, naming every file that could not be read.
    """
    found, others = files_in(paths)
    lines = FORMATS[form](model.labels, per_second)
    on_file(len(found))
    if form == "csv":
        print("filename", "scene_label", *map(in_csv, model.labels), sep="\t")
    bad: list[str] = []
    unreadable: list[str] = []
    for name, path in found:
        try:
            own = answer(model, name, path)
            print(*lines(own), sep="\n", flush=True)
            if own.note:
                print(f"asc-ray: {printable(name)}: {own.note}", file=sys.stderr)
        except UserError as error:
            bad.append(f"{printable(name)}: {error}")
            if "unreadable" in str(error):
                unreadable.append(path.name)
        on_file(0)
    if others:
        counts = ", ".join(f"{number} {printable(suffix)}" for suffix, number in sorted(others.items()))
        print(f"asc-ray: left out, no sound by their suffix: {counts}", file=sys.stderr)
    if count := len(bad):
        if unreadable:
            bad.append(f"ffmpeg converts most formats: ffmpeg -i {shlex.quote(printable(unreadable[0]))} converted.wav")
        raise UserError(f"{count} of {len(found)} files without an answer:\n  " + "\n  ".join(bad))


def predict_live(model: Model, stream: BinaryIO, rate: int, channels: int, form: str) -> None:
    """Print a line for each second of a stream of raw PCM. Raises UserError for a stream without a sample."""
    if form == "csv":
        raise UserError("--format csv: DCASE's output.csv has a line a file; choose table or jsonl for a stream")
    for second, (probabilities, silent) in enumerate(live(model, stream, rate, channels)):
        best = int(probabilities.argmax())
        if form == "jsonl":
            values = {label: round(float(p), 6) for label, p in zip(model.labels, probabilities, strict=True)}
            entry = {"second": second, "scene_label": model.labels[best], "probabilities": values}
            print(json.dumps(entry | ({"note": "silent"} if silent else {})), flush=True)
        else:
            width, note = max(map(len, model.labels)), "  silent" if silent else ""
            line = f"{second:5d} s  {model.labels[best]:<{width}}  {100 * probabilities[best]:5.1f} %{note}"
            print(line, flush=True)
