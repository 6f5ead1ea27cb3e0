"""Kaldi's log filter bank, which BEATs, AST and EAT take, of whole batches.

x at 32 kHz -> `sample_rate` -> frames  ->  x - mean of the frame  ->  x[t] - 0.97 x[t-1]  ->  window, power  ->
Kaldi's mel bank  ->  log  ->  (x - mean) / (2 std)

torchaudio's `compliance.kaldi.fbank` takes one waveform at a time and makes its mel bank anew for each; this one agrees
with it to 1e-4 (tests/test_torchaudio.py).
"""

import torch
from torch import Tensor, nn

from asc_ray.audio.config import WAVE_RATE, KaldiFbankConfig
from asc_ray.audio.resample import Resampler
from asc_ray.runtime.frontend import mel_bank

_LEAST = torch.finfo(torch.float32).eps  # of a mel bin, before its logarithm
_CPU_SLAB = 16  # clips per pass on the CPU, whose spectra stay in the cache


class KaldiFbank(nn.Module):
    """Turns waveforms at 32 kHz into Kaldi's log filter banks; it has no weights and gives no gradient."""

    window: Tensor
    bank: Tensor

    def __init__(self, config: KaldiFbankConfig) -> None:
        super().__init__()
        self.config = config
        self.resampler = AtRate(config.sample_rate)
        self.n_fft = 1 << (config.window - 1).bit_length()
        bank = mel_bank(config.sample_rate, self.n_fft, config.mels, config.fmin, config.fmax)
        self.register_buffer("window", _window(config), persistent=False)
        self.register_buffer("bank", torch.from_numpy(bank).T.contiguous(), persistent=False)

    @torch.no_grad()
    def forward(self, wave: Tensor, fmax_shift: Tensor | None = None) -> Tensor:
        """Turn (..., T) float32 in +-1 at 32 kHz into (..., mels, frames) float32. `fmax_shift` changes nothing.

        Raises ValueError where T is shorter than a frame.
        """
        *leading, samples = wave.shape
        if self.config.frames(samples) < 1:
            raise ValueError(f"a clip of {samples} samples is shorter than a frame")
        clips = wave.reshape(-1, samples)
        tf32 = torch.backends.cuda.matmul.allow_tf32  # a training may allow it, but the logarithms would lose digits
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            slabs = clips.split(_CPU_SLAB) if wave.device.type == "cpu" else [clips]
            fbank = torch.cat([self._transform(slab) for slab in slabs])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        return fbank.view(*leading, *fbank.shape[1:])

    def _transform(self, wave: Tensor) -> Tensor:
        config = self.config
        frames = (self.resampler(wave) * config.scale).unfold(1, config.window, config.hop)
        frames = frames - frames.mean(dim=2, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)  # a frame's first sample stands before itself
        spectrum = torch.fft.rfft((frames - 0.97 * before) * self.window, n=self.n_fft)
        mel = spectrum.abs().square()[..., :-1] @ self.bank
        return mel.clamp(min=_LEAST).log().sub(config.mean).div(2 * config.std).transpose(1, 2).contiguous()


class AtRate(nn.Module):
    """Resamples waveforms (B, T) from 32 kHz, for the rate of most published networks is another one."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self._resampler: Resampler | None = None  # of the last waves' length

    @torch.no_grad()
    def forward(self, wave: Tensor) -> Tensor:
        """Return (B, round(T * rate / 32000))."""
        if self.rate == WAVE_RATE:
            return wave
        samples = wave.shape[1]
        if self._resampler is None or self._resampler.samples != samples:
            self._resampler = Resampler(samples, WAVE_RATE, self.rate).to(wave.device)
        return self._resampler(nn.functional.pad(wave, (0, self._resampler.size - samples)))


def _window(config: KaldiFbankConfig) -> Tensor:
    if config.window_type == "hamming":
        return torch.hamming_window(config.window, periodic=False, alpha=0.54, beta=0.46)
    if config.window_type == "rectangular":
        return torch.ones(config.window)
    hann = torch.hann_window(config.window, periodic=False)
    return hann**0.85 if config.window_type == "povey" else hann
