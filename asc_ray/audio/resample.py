"""Resampling of whole batches by one multiplication in the frequency domain, with the filter of soxr HQ.

soxr resamples one clip at a time. A clip of a second is short enough to be transformed whole: its spectrum is filtered,
cut or extended to the new rate and transformed back, which takes half the time (bench/ingest.py).
"""

from math import ceil, gcd

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# Zeros behind the wave, in seconds: ringing at one end dies away before it wraps round to the other.
_GUARD = 1 / 64


def resample(waves: Tensor, rate: int, target: int) -> Tensor:
    """Resample (B, T) float32 at `rate` Hz to (B, round(T * target / rate)) at `target` Hz; silence surrounds them."""
    resampler = Resampler(waves.shape[1], rate, target)
    return resampler(functional.pad(waves, (0, resampler.size - waves.shape[1])))


class Resampler(nn.Module):
    """Resamples from `rate` to `target` Hz: waves of `samples` samples in a buffer of `size`, with zeros behind them.

    The gain of each bin is soxr HQ's: the spectrum of its response to an impulse, which is put where both rates have a
    sample.
    """

    _gain: Tensor

    def __init__(self, samples: int, rate: int, target: int) -> None:
        import soxr  # here, because a training on stored clips does not need it

        super().__init__()
        self.samples = samples
        step, new_step = rate // gcd(rate, target), target // gcd(rate, target)
        multiple = fft_size(ceil((samples + rate * _GUARD) / step))  # the sizes have the ratio of the rates
        self.size, self._new_size = multiple * step, multiple * new_step
        self._new_samples = round(samples * target / rate)
        impulse = np.zeros(self.size)
        impulse[multiple // 2 * step] = 1.0
        response = np.roll(soxr.resample(impulse, rate, target, quality="HQ"), -(multiple // 2 * new_step))
        gain = np.fft.rfft(response).real[: min(self.size, self._new_size) // 2 + 1]
        self.register_buffer("_gain", torch.from_numpy(gain).float(), persistent=False)

    def forward(self, padded: Tensor) -> Tensor:
        """Resample (B, size) float32 to (B, round(samples * target / rate))."""
        spectrum = torch.fft.rfft(padded)[:, : len(self._gain)].mul_(self._gain)
        return torch.fft.irfft(spectrum, n=self._new_size)[:, : self._new_samples]


def fft_size(least: int) -> int:
    """Return the smallest even number >= `least` with no prime factor above 5: fast on the CPU and on the GPU."""
    odd = [3**i * 5**j for i in range(12) for j in range(8)]
    return min(factor << max(1, (-(-least // factor) - 1).bit_length()) for factor in odd)
