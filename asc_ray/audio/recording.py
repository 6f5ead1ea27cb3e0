"""Recordings of any format that libsndfile decodes, read from their first sample to their last.

libsndfile believes what a container says of its length. Three kinds of file say too little and are mended here before
they are decoded: MP3 files without a count of their frames, because libsndfile estimates their length from the first
ones; chained Ogg streams and joined MP3 files, because it would read only the first one. A container that promises too
much was cut short, which is an error. A length of `-1` or the like, as in headers of streams, says nothing.
"""

import io
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import soundfile as sf

from asc_ray.errors import UserError
from asc_ray.files import open_plain
from asc_ray.runtime import scale_fault

LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # Hz
MOST_CHANNELS = 128
CUT_SHORT = 0.1  # seconds that a container may promise beyond what there is
UNKNOWN_BYTES = 0x7FFF0000  # this size or more means "until the end", in headers that were written before the data
# Channels cancel each other if their mean has less than this share of their power.
CANCELLED = 1e-3

# How recordings of formats begin that libsndfile does not decode, and where.
_FOREIGN = {
    (4, b"ftyp"): "MP4", (0, b"\x1aE\xdf\xa3"): "WebM or Matroska", (0, b"0&\xb2u\x8ef\xcf\x11"): "WMA",
    (0, b"#!AMR"): "AMR", (0, b"\xff\xf1"): "AAC", (0, b"\xff\xf9"): "AAC", (0, b"MAC "): "Monkey's Audio",
    (0, b"wvpk"): "WavPack", (0, b"DSD "): "DSD",
}  # fmt: skip
# libsndfile's own errors, and what soundfile raises for formats that it is told too little of.
_ERRORS = (sf.SoundFileError, OSError, TypeError, ValueError)
# What libsndfile notes while it opens a file: the size in the header and the real one, or the frames in the header.
_PROMISED_BYTES = re.compile(r"(?:data|Data [Ss]ize|SSND|BODY|riff) *: *(\d+) \(should be (\d+)\)")
_PROMISED_FRAMES = re.compile(r"does not match value from 'ds64' chunk of (\d+)")


class BadAudio(UserError):
    """A recording that cannot be used; the message is the reason."""


def check_rate(rate: int) -> None:
    """Raise BadAudio for an impossible sampling rate, because resampling it could take any amount of memory."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise BadAudio(f"a rate of {rate} Hz; allowed are {LOWEST_RATE} to {HIGHEST_RATE} Hz")


def check_scale(samples: np.ndarray) -> None:
    """Raise BadAudio for floating-point samples that are not finite, or not of the scale +-1."""
    if fault := scale_fault(samples):
        raise BadAudio(fault)


def cancels(mono: float, channels: float) -> bool:
    """Whether channels cancel each other, given the power of their mean and the mean of their powers."""
    return mono < CANCELLED * channels


class Recording:
    """An open recording with its `rate` in Hz, its `channels`, and its number of samples from two sources.

    `promised` is the container's number, None where it has none; `believed` is libsndfile's, which may be an estimate.
    Raises BadAudio where the file cannot be decoded, has a rate outside 1 kHz to 1 MHz, or was joined from pieces that
    differ in rate or channels.
    """

    def __init__(self, path: Path) -> None:
        self._waiting: list[Any] = []
        try:
            open_plain(path).close()  # libsndfile would wait for the end of a pipe
        except OSError as error:
            raise BadAudio(f"unreadable ({error.strerror})") from None
        try:
            self._file = _opened(os.fsencode(path))
        except BadAudio:
            if kind := _foreign(path):
                raise BadAudio(f"unreadable ({kind}, which libsndfile does not decode)") from None
            raise
        try:
            check_rate(self._file.samplerate)
            if self._file.channels > MOST_CHANNELS:
                raise BadAudio(f"{self._file.channels} channels; allowed are {MOST_CHANNELS}")
            self.rate, self.channels = self._file.samplerate, self._file.channels
            self.promised, self.believed = _promised(self._file), int(self._file.frames)
            if self._file.format in ("MP3", "OGG"):
                with open(path, "rb") as file:
                    self._mend(file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, frames: int) -> np.ndarray:
        """Return the next (up to `frames`, channels) samples, float32; fewer only at the end. Raises BadAudio."""
        out = np.empty((frames, self.channels), np.float32)
        filled = 0
        while filled < frames:
            count = _read(self._file, out[filled:])
            filled += count
            if count == 0:
                if not self._waiting:
                    break
                self._file.close()
                self._file = _opened(io.BytesIO(self._waiting.pop(0)))
                if (self._file.samplerate, self._file.channels) != (self.rate, self.channels):
                    raise BadAudio("unreadable (it is joined of parts that differ in rate or channels)")
        return out[:filled]

    def blocks(self, frames: int) -> Iterator[np.ndarray]:
        """Yield all samples, (up to `frames`, channels) at a time. Raises BadAudio, at the end if it is cut short."""
        count = 0
        while len(block := self.read(frames)):
            count += len(block)
            yield block
        self.check_end(count)

    def frames(self) -> int:
        """Return the number of samples; the file is read for it where its header does not say it. Raises BadAudio."""
        guessed = self._file.format == "MP3" and self.promised is None
        if self._waiting or guessed or self.believed >= 1 << 36:
            return sum(len(block) for block in self.blocks(1 << 16))
        self.check_end(self.believed)
        return self.believed

    def check_end(self, count: int) -> None:
        """Raise BadAudio where the container promises more than the `count` samples that there are."""
        if self.promised is not None and count < self.promised - CUT_SHORT * self.rate:
            raise BadAudio(f"cut short: {count} of {self.promised} samples")

    def _mend(self, file: BinaryIO) -> None:
        """Replace or extend the file if libsndfile would read only its beginning."""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if self._file.format == "OGG":
                links = _ogg_links(data)
                if len(links) > 1:
                    self._waiting = [data[link] for link in links[1:]]
                return
            found = _mp3(data)
            if found is None:
                return
            self.promised = None if found.counted is None else found.counted * found.samples
            if len(found.frames) * found.samples > self._file.frames + 3 * found.samples:
                self._file.close()
                self._file = _opened(io.BytesIO(found.rebuilt(data)))
                self.promised, self.believed = None, int(self._file.frames)


def _opened(source: Any) -> sf.SoundFile:
    try:
        return sf.SoundFile(source)
    except _ERRORS as error:
        raise BadAudio(_unreadable(error)) from None


def _foreign(path: Path) -> str:
    """Return which known format the file begins as that libsndfile does not decode; empty for none."""
    with open_plain(path) as file:
        head = file.read(16)
    return next((kind for (at, magic), kind in _FOREIGN.items() if head[at:].startswith(magic)), "")


def _unreadable(error: Exception) -> str:
    return f"unreadable ({str(error).rpartition(': ')[2]})"


def _read(file: sf.SoundFile, out: np.ndarray) -> int:
    """Fill `out` as far as the file goes, and return the number of frames.

    It calls libsndfile itself, because soundfile's `read` seeks to the end of the whole block, which fails at the end
    of a FLAC stream of unknown length.
    """
    pointer = sf._ffi.cast("float*", sf._ffi.from_buffer(out))
    count = int(sf._snd.sf_readf_float(file._file, pointer, len(out)))
    if count < len(out) and (code := sf._snd.sf_error(file._file)):
        raise BadAudio(_unreadable(sf.LibsndfileError(code)))
    return count


def _promised(file: sf.SoundFile) -> int | None:
    """Return the samples that the header promises, where libsndfile counted others or none; else None."""
    notes = file.extra_info
    if match := _PROMISED_FRAMES.search(notes):
        return int(match[1])
    if match := _PROMISED_BYTES.search(notes):
        promised, there = map(int, match.groups())
        return None if promised >= UNKNOWN_BYTES else round(file.frames * promised / max(1, there))
    return file.frames if file.format == "FLAC" and file.frames < 1 << 36 else None


# --- Ogg --------------------------------------------------------------------------------------------------------------


def _ogg_links(data: mmap.mmap) -> list[slice]:
    """Return the streams that follow each other in an Ogg file: the first pages of each are marked."""
    starts, at, beginning = [0], 0, True
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        begins = bool(data[at + 5] & 2)
        if begins and not beginning:
            starts.append(at)
        beginning = begins
        table = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + len(table) + sum(table)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


# --- MP3 --------------------------------------------------------------------------------------------------------------

_RATES = (44_100, 48_000, 32_000)
_KBITS = {  # by whether it is MPEG-1
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclass(frozen=True)
class _Frame:
    """The header of a frame of MPEG audio, layer III."""

    start: int
    size: int  # bytes
    rate: int
    samples: int
    tag: int  # bytes from the frame's start to the count of frames, if it holds one

    @classmethod
    def at(cls, data: Any, start: int) -> "_Frame | None":
        """Return the frame that starts at `start`; None where none does."""
        head = data[start : start + 4]
        if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # no sync bits, or not layer III
            return None
        version, kbits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
        if version == 1 or not 0 < kbits < 15 or rate == 3:
            return None
        first, mono = version == 3, head[3] >> 6 == 3
        hertz = _RATES[rate] >> (0 if first else 1 if version == 2 else 2)
        samples = 1152 if first else 576
        size = samples // 8 * _KBITS[first][kbits - 1] * 1000 // hertz + (head[2] >> 1 & 1)
        side = (17 if mono else 32) if first else (9 if mono else 17)
        return cls(start, size, hertz, samples, 4 + (0 if head[1] & 1 else 2) + side)


@dataclass(frozen=True)
class _Mp3:
    """The frames of sound in an MP3 file, in order, and the number that its header gives, if any."""

    frames: list[_Frame]
    counted: int | None

    @property
    def samples(self) -> int:
        """The samples of one frame."""
        return self.frames[0].samples

    def rebuilt(self, data: Any) -> bytes:
        """Return the file with a header that counts all of its frames."""
        first = self.frames[0]
        head = bytearray(data[first.start : first.start + 4])
        head[1] |= 1  # no checksum
        head[2] = head[2] & 0x0C | 9 << 4  # a size that holds the count
        size = _Frame.at(head, 0).size  # type: ignore[union-attr]
        tag = _Frame.at(head, 0).tag  # type: ignore[union-attr]
        count = b"Xing" + (1).to_bytes(4, "big") + len(self.frames).to_bytes(4, "big")
        header = (bytes(head) + bytes(tag - 4) + count).ljust(size, b"\0")
        return header + b"".join(data[frame.start : frame.start + frame.size] for frame in self.frames)


def _mp3(data: Any) -> _Mp3 | None:
    """Find all frames, past tags and other bytes; None if there are none. Raises BadAudio where the rate changes."""
    frames: list[_Frame] = []
    counted: int | None = None
    at, end = 0, len(data)
    while at < end:
        frame = _Frame.at(data, at)
        if frame is None or at + frame.size > end:
            at = _after_tag(data, at) or _next_frame(data, at + 1)
            continue
        tag = data[at + frame.tag : at + frame.tag + 12]
        if tag[:4] in (b"Xing", b"Info"):
            if not frames and tag[7] & 1:
                counted = int.from_bytes(tag[8:12], "big")
        elif frames and (frame.rate, frame.samples) != (frames[0].rate, frames[0].samples):
            raise BadAudio("unreadable (its rate changes on the way)")
        else:
            frames.append(frame)
        at += frame.size
    return _Mp3(frames, counted) if frames else None


def _after_tag(data: Any, at: int) -> int:
    """Return the end of an ID3 tag that starts here; 0 where none does."""
    head = data[at : at + 10]
    if head[:3] == b"ID3" and len(head) == 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        return at + 10 + size
    return at + 128 if head[:3] == b"TAG" else 0


def _next_frame(data: Any, at: int) -> int:
    """Return the next position where a frame starts with another behind it; the end where there is none."""
    while (at := data.find(b"\xff", at)) >= 0:
        frame = _Frame.at(data, at)
        if frame is not None and (following := _Frame.at(data, at + frame.size)) and following.rate == frame.rate:
            return at
        at += 1
    return len(data)
