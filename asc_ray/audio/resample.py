"""Resampling of whole batches by one multiplication in the frequency domain, with the filter of soxr HQ.

soxr resamples one clip at a time. A clip of a second is short enough to be transformed whole: its spectrum is filtered,
cut or extended to the new rate and transformed back, which takes half the time (bench/ingest.py).
"""

from functools import lru_cache
from math import ceil, gcd

import numpy as np
import soxr
import torch
from torch import Tensor

# Zeros behind the wave, in seconds: what rings out of one end has died away before it wraps round to the other.
_GUARD = 1 / 64


def resample(waves: Tensor, rate: int, target: int) -> Tensor:
    """(B, T) float32 at `rate` Hz -> (B, round(T * target / rate)) at `target` Hz; around the waves is silence."""
    samples = waves.shape[1]
    size, new_size, gain = _filter(samples, rate, target)
    spectrum = torch.fft.rfft(waves, n=size)[:, : len(gain)].mul_(gain)
    return torch.fft.irfft(spectrum, n=new_size)[:, : round(samples * target / rate)]


@lru_cache(maxsize=32)
def _filter(samples: int, rate: int, target: int) -> tuple[int, int, Tensor]:
    """FFT sizes before and after, in the ratio of the rates, and the gain of every bin that both have.

    The gain is that of soxr HQ: the spectrum of what it makes of an impulse, put where both grids have a sample.
    """
    step, new_step = rate // gcd(rate, target), target // gcd(rate, target)
    multiple = fft_size(ceil((samples + rate * _GUARD) / step))
    size, new_size = multiple * step, multiple * new_step
    impulse = np.zeros(size)
    impulse[multiple // 2 * step] = 1.0
    response = np.roll(soxr.resample(impulse, rate, target, quality="HQ"), -(multiple // 2 * new_step))
    gain = np.fft.rfft(response).real[: min(size, new_size) // 2 + 1]
    return size, new_size, torch.from_numpy(gain).float()


def fft_size(least: int) -> int:
    """The smallest even number >= `least` whose prime factors are 2, 3 and 5: fast on the CPU and on the GPU."""
    odd = [3**i * 5**j for i in range(12) for j in range(8)]
    return min(factor << max(1, (-(-least // factor) - 1).bit_length()) for factor in odd)
