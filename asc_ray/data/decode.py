"""Recordings of any format, rate and channel count to one second of int16 at 32 kHz, in batches of equal rate."""

import wave
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile as sf
import torch

from asc_ray.audio.resample import Resampler

SAMPLE_RATE = 32_000
CLIP_SAMPLES = 32_000
LENGTH_TOLERANCE = 0.1  # a clip may be this much shorter or longer than a second: padded or cropped
# Seconds read of a clip: the resampling filter hears what little follows the first one.
_READ = 1 + 1 / 64
# Samples of one batch: few enough to stay in the cache between the transforms.
_BATCH_SAMPLES = 3 << 18
_OPEN_BATCHES = 8  # a corpus of many rates must not hold a batch of each

Notes = Counter[str]  # what was done to a recording beyond reading it


class BadAudio(Exception):
    """A clip that cannot be used; the message is the reason."""


def decode(paths: Sequence[Path], out: np.ndarray) -> list[Notes | BadAudio]:
    """Read every recording as one second of mono at 32 kHz into its row of `out`, (len(paths), 32000) int16.

    Channels are averaged, other rates resampled, lengths within 10 % of a second cropped or zero-padded at the end,
    samples beyond full scale clipped and counted. A 16-bit mono file of one second at 32 kHz comes back bit for bit.
    BadAudio stands for a clip that is unreadable, empty, silent, not finite, shorter than 0.9 s or longer than 1.1 s;
    its row means nothing.
    """
    results: list[Notes | BadAudio] = [BadAudio("not read")] * len(paths)
    batches: dict[int, _Batch] = {}
    for row, path in enumerate(paths):
        try:
            with _open(path) as file:
                # Before reading, for the file may hold hours.
                seconds = _checked(file.frames / file.samplerate)
                rate = file.samplerate
                if rate not in batches:
                    if len(batches) == _OPEN_BATCHES:
                        batches.pop(next(iter(batches))).convert(out, results)
                    batches[rate] = _Batch(rate)
                batch = batches[rate]
                batch.read(file, row, seconds)
        except BadAudio as error:
            results[row] = error
        except (sf.SoundFileError, OSError) as error:
            results[row] = BadAudio(f"unreadable ({str(error).rpartition(': ')[2]})")
        else:
            if batch.full:
                batch.convert(out, results)
    for batch in batches.values():
        batch.convert(out, results)
    return results


def _checked(seconds: float) -> float:
    if not 1 - LENGTH_TOLERANCE <= seconds <= 1 + LENGTH_TOLERANCE:
        raise BadAudio("no samples" if seconds == 0 else f"{seconds:.2f} s long, one second is expected")
    return seconds


def _open(path: Path) -> "_PcmWav | sf.SoundFile":
    try:
        return _PcmWav(path)
    except (wave.Error, EOFError, OSError):
        return sf.SoundFile(path)


class _PcmWav:
    """A whole WAV file of 16, 24 or 32 bits, with what is used here of soundfile's interface and its very values.

    Corpora are mostly of such files, and NumPy converts their samples in a third of libsndfile's time. Raises
    wave.Error for anything else: that is soundfile's to read, or to name as broken.
    """

    def __init__(self, path: Path) -> None:
        self._file = wave.open(str(path), "rb")  # noqa: SIM115
        self.samplerate, self.frames, self.channels = (
            self._file.getframerate(), self._file.getnframes(), self._file.getnchannels()
        )  # fmt: skip
        self._bytes = self._file.getsampwidth()
        whole = self.frames * self.channels * self._bytes < path.stat().st_size
        if not (whole and self._bytes in (2, 3, 4) and self.samplerate):
            self._file.close()
            raise wave.Error

    def __enter__(self) -> "_PcmWav":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, out: np.ndarray) -> np.ndarray:
        """Fill `out`, (frames,) or (frames, channels) float32, as far as the file goes; the part that is filled."""
        raw = self._file.readframes(len(out))
        filled = out[: len(raw) // (self.channels * self._bytes)]
        if self._bytes == 3:
            # Every third byte starts an int32 whose upper three bytes are a sample; the lowest is the one before's.
            padded = np.frombuffer(b"\0" + raw, np.uint8)
            samples = np.ndarray(filled.size, "<i4", padded, strides=(3,)) & -256
        else:
            samples = np.frombuffer(raw, f"<i{self._bytes}", filled.size)
        scale = np.float32(2.0**-15 if self._bytes == 2 else 2.0**-31)
        np.multiply(samples.reshape(filled.shape), scale, out=filled, dtype=np.float32, casting="unsafe")
        return filled


class _Batch:
    """Recordings of one rate, decoded and waiting to be resampled together."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        width = int(rate * _READ)
        self._resampler = Resampler(width, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else None
        size = self._resampler.size if self._resampler else width
        self._buffer = np.zeros((max(1, _BATCH_SAMPLES // width), size), dtype=np.float32)
        self._waves = self._buffer[:, :width]
        self._clips: list[tuple[int, int, Notes]] = []  # row of the result, samples of it that are the clip's, notes

    @property
    def full(self) -> bool:
        return len(self._clips) == len(self._waves)

    def read(self, file: _PcmWav | sf.SoundFile, row: int, seconds: float) -> None:
        """Raises BadAudio, leaving the batch as it was."""
        notes = Notes()
        mono = self._waves[len(self._clips)]
        if file.channels == 1:
            frames = len(file.read(out=mono))
        else:
            channels = file.read(out=np.empty((len(mono), file.channels), dtype=np.float32))
            frames = len(channels)
            channels.mean(axis=1, out=mono[:frames])
            notes["stereo mixed down" if file.channels == 2 else f"{file.channels} channels mixed down"] = 1
        if frames < min(file.frames, len(mono)):  # the header promised more
            seconds = _checked(frames / self.rate)
        mono[frames:] = 0
        power = float(mono @ mono)  # one pass finds both kinds of bad value
        if not np.isfinite(power) and (count := int((~np.isfinite(mono)).sum())):
            raise BadAudio(f"{count} samples are not finite")
        if power == 0 and not mono.any():
            raise BadAudio("silent: every sample is zero")
        if self.rate != SAMPLE_RATE:
            notes[f"resampled {self.rate} Hz"] = 1
        samples = round(seconds * SAMPLE_RATE)
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
            elif low[index] == high[index] == 0:  # below half a bit, or opposite channels
                results[row] = BadAudio("silent: every sample is zero after conversion to 16-bit mono")
            out[row, :samples] = scaled[index, :samples]
            out[row, samples:] = 0
        self._clips = []
