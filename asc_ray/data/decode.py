"""Decoding of recordings of any format, rate and channel count to one second of int16 at 32 kHz, batched by rate."""

import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from asc_ray.audio.recording import BadAudio, Recording, cancels, check_rate, check_scale
from asc_ray.audio.resample import Resampler
from asc_ray.data.clips import CLIP_SAMPLES, SAMPLE_RATE
from asc_ray.files import open_plain

LENGTH_TOLERANCE = 0.1  # a clip may be this much shorter or longer than a second; it is padded or cropped
CUT = "corpus.segment_seconds=1.0 cuts longer recordings"
QUIET = 10  # steps of 16 bits: a clip that is nowhere louder (-70 dB) is noted
# Seconds that are read of a clip: the resampling filter reaches a little beyond the first one.
_READ = 1 + 1 / 64
# Samples of one batch: few enough to stay in the cache between the transforms.
_BATCH_SAMPLES = 3 << 18
_OPEN_BATCHES = 8  # a corpus of many rates must not hold a batch of each

Notes = Counter[str]  # what was done to a recording beyond reading it


def decode(paths: Sequence[Path], out: np.ndarray, seconds: Sequence[int] | None = None) -> list[Notes | BadAudio]:
    """Read every recording as one second of mono at 32 kHz into its row of `out`, (len(paths), 32000) int16.

    With `seconds` a row gets that second of its recording, from 0, as if it were a file of its own; a recording's rows
    follow each other, their seconds ascending. Without, a recording is about one second long.

    Channels are averaged, other rates resampled, lengths within 10 % of a second cropped or zero-padded at the end,
    samples beyond full scale clipped and counted. A 16-bit mono file of one second at 32 kHz comes back bit for bit.
    BadAudio stands for a clip that is unreadable, empty, cut short, silent, not finite, of another scale than +-1,
    shorter than 0.9 s or longer than 1.1 s, or whose channels cancel each other; its row means nothing.
    """
    results: list[Notes | BadAudio] = [BadAudio("not read")] * len(paths)
    batches: dict[int, _Batch] = {}
    for row, found in enumerate(_waves(paths, seconds)):
        try:
            if isinstance(found, BadAudio):
                raise found
            wave, rate = found
            if rate not in batches:
                if len(batches) == _OPEN_BATCHES:
                    batches.pop(next(iter(batches))).convert(out, results)
                batches[rate] = _Batch(rate)
            batch = batches[rate]
            batch.add(wave, row)
        except BadAudio as error:
            results[row] = error
        else:
            if batch.full:
                batch.convert(out, results)
    for batch in batches.values():
        batch.convert(out, results)
    return results


def _waves(paths: Sequence[Path], seconds: Sequence[int] | None) -> Iterator[tuple[np.ndarray, int] | BadAudio]:
    """Yield the samples (frames, channels) of each row, and their rate in Hz."""
    if seconds is not None:
        for path, rows in groupby(zip(paths, seconds, strict=True), key=itemgetter(0)):
            yield from _cut(path, [second for _, second in rows])
        return
    for path in paths:
        try:
            yield _second(path)
        except BadAudio as error:
            yield error


def _cut(path: Path, seconds: Sequence[int]) -> Iterator[tuple[np.ndarray, int] | BadAudio]:
    """Yield these seconds of a recording, ascending. It is read in order, because not every format can be entered."""
    left = len(seconds)
    try:
        with Recording(path) as recording:
            rate, at = recording.rate, 0
            for second in seconds:
                for _ in range(at, second):
                    recording.read(rate)
                wave, at = recording.read(rate), second + 1
                if len(wave) < rate:
                    recording.check_end(second * rate + len(wave))
                    if second:
                        raise BadAudio(f"cut short: its header promises a second {second} that is not there")
                    _check_length(len(wave) / rate)
                left -= 1
                yield wave, rate
    except BadAudio as error:
        yield from [error] * left


def whole_seconds(path: Path) -> tuple[int, float]:
    """Return how many seconds a recording is cut into, and how much is left of it, in seconds.

    One of 0.9 to 1 second is a second, as without cutting. Raises BadAudio for a shorter one, and where its length
    cannot be found.
    """
    if wav := _PcmWav.of(path):
        frames, rate = wav.frames, wav.rate
    else:
        with Recording(path) as recording:
            frames, rate = recording.frames(), recording.rate
    if frames < rate:
        _check_length(frames / rate)
        return 1, 0.0
    return frames // rate, frames % rate / rate


def _second(path: Path) -> tuple[np.ndarray, int]:
    """Return the samples (frames, channels) of a recording of about one second, and its rate in Hz. Raises BadAudio."""
    if wav := _PcmWav.of(path):
        _check_length(wav.frames / wav.rate)
        return wav.samples(path), wav.rate
    with Recording(path) as recording:
        longest = int((1 + LENGTH_TOLERANCE) * recording.rate)
        wave = recording.read(longest + 1)
        if len(wave) <= longest:
            recording.check_end(len(wave))
            _check_length(len(wave) / recording.rate)
            return wave, recording.rate
        if longest < recording.believed < 1 << 40:
            raise BadAudio(_of_length(recording.believed / recording.rate))
        raise BadAudio(f"more than {1 + LENGTH_TOLERANCE} s long, one second is expected; {CUT}")


def _check_length(seconds: float) -> None:
    if not 1 - LENGTH_TOLERANCE <= seconds <= 1 + LENGTH_TOLERANCE:
        raise BadAudio("no samples" if seconds == 0 else _of_length(seconds))


def _of_length(seconds: float) -> str:
    return f"{seconds:.2f} s long, one second is expected" + (f"; {CUT}" if seconds > 1 else "")


@dataclass(frozen=True)
class _PcmWav:
    """A whole WAV file of 16, 24 or 32 bits without anything unusual.

    Most clips are such files, and NumPy converts their samples to libsndfile's values in a third of its time. Every
    other form is left to libsndfile, which reads it or names it as broken.
    """

    rate: int
    channels: int
    bytes_each: int  # per sample
    frames: int
    start: int  # of the samples in the file, bytes

    @classmethod
    def of(cls, path: Path) -> "_PcmWav | None":
        """Read a file's header; None where it is not certainly of this form. Raises BadAudio for an impossible rate."""
        try:
            with open_plain(path) as file:
                length, head = os.fstat(file.fileno()).st_size, file.read(_HEAD)
        except OSError:
            return None
        chunk, tag, channels, rate, _, block, bits = struct.unpack_from("<IHHIIHH", head.ljust(_HEAD, b"\0"), 16)
        plain = tag == _PCM and chunk in (16, 18)
        valid, kind = head[38:40], head[44:60]  # bits of a sample, and its format
        extended = tag == _EXTENSIBLE and chunk == 40 and (valid, kind) == (bits.to_bytes(2, "little"), _PCM_GUID)
        if (head[:4], head[8:16]) != (b"RIFF", b"WAVEfmt ") or not (plain or extended):
            return None
        at = 20 + chunk
        while (name := head[at : at + 4]) != b"data":
            size = int.from_bytes(head[at + 4 : at + 8], "little")
            if name != b"LIST" or size % 2 or at + 8 + size > _HEAD:  # no other chunk is skipped
                return None
            at += 8 + size
        size, start = int.from_bytes(head[at + 4 : at + 8], "little"), at + 8
        end = int.from_bytes(head[4:8], "little") + 8
        whole = start < start + size == end == length  # and nothing behind
        if not (channels and bits in (16, 24, 32) and block == channels * bits // 8 and size % block == 0 and whole):
            return None
        check_rate(rate)
        return cls(rate, channels, bits // 8, size // block, start)

    def samples(self, path: Path) -> np.ndarray:
        """Read the samples, (frames, channels) float32."""
        raw = np.fromfile(path, np.uint8, self.frames * self.channels * self.bytes_each, offset=self.start)
        if self.bytes_each == 3:
            # Every third byte starts an int32 whose upper three bytes are a sample; its lowest is of the sample before.
            padded = np.concatenate([np.zeros(1, np.uint8), raw])
            values = np.ndarray(len(raw) // 3, "<i4", padded, strides=(3,)) & -256
        else:
            values = raw.view(f"<i{self.bytes_each}")
        scale = np.float32(2.0**-15 if self.bytes_each == 2 else 2.0**-31)
        return np.multiply(values, scale, dtype=np.float32, casting="unsafe").reshape(-1, self.channels)


_HEAD = 4096  # bytes in which the samples must begin
_PCM, _EXTENSIBLE = 1, 0xFFFE
_PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")


class _Batch:
    """Recordings of one rate, decoded and waiting to be resampled together."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        width = int(rate * _READ)
        self._resampler = Resampler(width, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else None
        size = self._resampler.size if self._resampler else width
        self._buffer = np.zeros((max(1, _BATCH_SAMPLES // width), size), dtype=np.float32)
        self._waves = self._buffer[:, :width]
        self._clips: list[tuple[int, int, Notes]] = []  # row of `out`, how many of its samples are the clip's, notes

    @property
    def full(self) -> bool:
        return len(self._clips) == len(self._waves)

    def add(self, wave: np.ndarray, row: int) -> None:
        """Take in a recording (frames, channels). Raises BadAudio, leaving the batch as it was."""
        notes = Notes()
        frames, channels = wave.shape
        check_scale(wave)
        kept = min(frames, self._waves.shape[1])
        mono = self._waves[len(self._clips)]
        wave[:kept].mean(axis=1, out=mono[:kept])
        mono[kept:] = 0
        if channels > 1:
            if cancels(float(mono @ mono), float(np.vdot(wave, wave)) / channels):
                raise BadAudio("silent: its channels cancel each other when they are mixed down")
            notes["stereo mixed down" if channels == 2 else f"{channels} channels mixed down"] = 1
        if mono[:kept].min() == mono[:kept].max():
            raise BadAudio("silent: every sample is zero" if mono[0] == 0 else "silent: all samples are equal")
        if self.rate != SAMPLE_RATE:
            notes[f"resampled {self.rate} Hz"] = 1
        samples = round(frames / self.rate * SAMPLE_RATE)
        if samples != CLIP_SAMPLES:
            notes["cropped" if samples > CLIP_SAMPLES else "padded"] = 1
        self._clips.append((row, samples, notes))

    def convert(self, out: np.ndarray, results: list[Notes | BadAudio]) -> None:
        """Resample and round to 16 bits into the rows of `out`; the batch is empty afterwards."""
        if not self._clips:
            return
        waves = torch.from_numpy(self._buffer[: len(self._clips)])
        if self._resampler:
            waves = self._resampler(waves)
        scaled = waves[:, :CLIP_SAMPLES].mul_(32768).round_()  # both in place: neither is used again
        low, high = scaled.amin(dim=1).tolist(), scaled.amax(dim=1).tolist()
        for index, (row, samples, notes) in enumerate(self._clips):
            results[row] = notes
            if low[index] < -32768 or high[index] > 32767:
                beyond = (scaled[index] < -32768) | (scaled[index] > 32767)
                notes.update({"clipped": 1, "samples clipped": int(beyond.sum())})
                scaled[index].clamp_(-32768, 32767)
            elif low[index] == high[index]:  # below half a bit
                results[row] = BadAudio("silent: every sample is zero after conversion to 16-bit mono")
            elif max(-low[index], high[index]) < QUIET:
                notes["nowhere louder than -70 dB"] = 1
            out[row, :samples] = scaled[index, :samples]
            out[row, samples:] = 0
        self._clips = []
