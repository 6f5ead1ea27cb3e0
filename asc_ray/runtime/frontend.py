"""The log-mel front end in NumPy; `asc_ray.audio.frontend` is the same one in torch, and takes its mel bank from here.

x[t] - 0.97 x[t-1]  ->  centred STFT, power  ->  Kaldi mel bank  ->  log(mel + 1e-5)  ->  (x + 4.5) / 5
"""

from dataclasses import dataclass

import numpy as np

# Mel bins per matrix product: their triangles share a narrow band of FFT bins, the rest of the bank is zero.
_GROUP = 16
_MOST_SAMPLES = 1 << 22  # two minutes at 32 kHz
_MOST_WORK = 1 << 23  # values of a clip's spectrogram, or of the mel bank; the recipes' have up to 2.6e5 and 1e6


@dataclass(frozen=True)
class Frontend:
    """Settings of a log-mel front end. Frequencies in Hz, lengths (`samples` is a clip's) in samples."""

    sample_rate: int
    samples: int
    n_fft: int
    window: int
    hop: int
    mels: int
    fmin: float
    fmax: float

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for settings that no front end can have."""
        lengths = (self.sample_rate, self.samples, self.n_fft, self.window, self.hop, self.mels)
        if not all(type(value) is int and 0 < value <= _MOST_SAMPLES for value in lengths):
            raise ValueError(
                f"sample_rate, samples, n_fft, window, hop and mels must be whole numbers from 1 to {_MOST_SAMPLES:,}"
            )
        if self.window > self.n_fft or self.n_fft % 2:
            raise ValueError(f"window {self.window} must not exceed n_fft {self.n_fft}, an even number")
        if self.frames * max(self.n_fft, self.mels) > _MOST_WORK or self.mels * self.n_fft > _MOST_WORK:
            raise ValueError(
                f"{self.frames} frames of n_fft {self.n_fft} and {self.mels} mels are more than a front end takes"
            )
        if {type(self.fmin), type(self.fmax)} - {int, float} or not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(f"0 <= fmin {self.fmin} < fmax {self.fmax} <= half of sample_rate must hold")

    @property
    def frames(self) -> int:
        """The frames of a clip; pre-emphasis takes one sample."""
        return 1 + (self.samples - 1) // self.hop


def mel_bank(sample_rate: int, n_fft: int, mels: int, fmin: float, fmax: float) -> np.ndarray:
    """Return Kaldi's mel bank, (mels, n_fft // 2) float32: triangles in mel = 1127 ln(1 + f / 700).

    The Nyquist bin, which Kaldi leaves out, has no column.
    """
    at, edges = mel_places(sample_rate, n_fft, mels, fmin, fmax)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.minimum((at - left) / (centre - left), (right - at) / (right - centre))
    return np.maximum(bank, 0).astype(np.float32)


def hann_window(length: int) -> np.ndarray:
    """Return the symmetric window of Hann, (length) float32."""
    position = 2 * np.pi * np.arange(length) / max(1, length - 1)
    return (0.5 - 0.5 * np.cos(position)).astype(np.float32)


def mel_places(sample_rate: int, n_fft: int, mels: int, fmin: float, fmax: float) -> tuple[np.ndarray, np.ndarray]:
    """Return where the bins of the transform lie, (n_fft // 2), and the edges of the triangles, (mels + 2), in mel."""

    def mel(hertz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hertz / 700.0)

    low, high = mel(np.array([fmin, fmax]))
    return mel(np.arange(n_fft // 2) * (sample_rate / n_fft)), np.linspace(low, high, mels + 2)


class LogMel:
    """Turns waveforms (B, samples) float32 in +-1 into log-mels (B, 1, mels, frames) float32."""

    def __init__(self, frontend: Frontend) -> None:
        f = self._frontend = frontend
        self._window = hann_window(f.window)
        bank = mel_bank(f.sample_rate, f.n_fft, f.mels, f.fmin, f.fmax)
        self._bands = [_band(bank[start : start + _GROUP]) for start in range(0, f.mels, _GROUP)]

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        return np.stack([self._transform(wave) for wave in waves])[:, None]

    def _transform(self, wave: np.ndarray) -> np.ndarray:
        f = self._frontend
        wave = wave[1:] - np.float32(0.97) * wave[:-1]
        # The power does not depend on where the window stands in the n_fft samples: only what is under it is cut out.
        left = f.n_fft // 2 - (f.n_fft - f.window) // 2
        padded = np.pad(wave, (left, f.window - left), mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, f.window)[:: f.hop]
        spectrum = np.fft.rfft(frames * self._window, n=f.n_fft)
        power = spectrum.real**2 + spectrum.imag**2
        mel = np.concatenate([power[:, start:stop] @ weights for start, stop, weights in self._bands], axis=1)
        return ((np.log(mel.T + np.float32(1e-5)) + np.float32(4.5)) / np.float32(5)).astype(np.float32)


def _band(bank: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Return the FFT bins that some rows of the mel bank use, start to stop, and weights (stop - start, rows)."""
    used = np.flatnonzero(bank.any(axis=0))
    start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    return start, stop, np.ascontiguousarray(bank[:, start:stop].T)
