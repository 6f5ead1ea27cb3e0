"""Augmentation of batches on the GPU or CPU that trains (READING.md "Augmentation"), in the published code's order:

    waveform: crop, DIR / ADIR, roll, mixup     log-mel: frequency and time mask, Freq-MixStyle

Everything random is drawn on the host beforehand, so a GPU meets no data-dependent shape, no synchronization and no
loop over clips, and a draw gives the same batch on every GPU or CPU.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from asc_ray.audio.config import AnyFrontendConfig, AugmentConfig, check_masks
from asc_ray.audio.frontend import FMAX_STEP
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.audio.resample import fft_size


@dataclass(frozen=True, eq=False)
class Draw:
    """The random choices for one batch of B clips; None where an augmentation is off.

    A frequency or time mask is (width, u): it starts at floor(u * (size - width + 1)). A style weight of 1 leaves its
    clip as it is.
    """

    fmax_shift: Tensor  # (B,) float32, Hz, for LogMel: the same for all clips
    start: Tensor | None  # (B,) int64, samples after the clip's own first one
    response: Tensor | None  # (B,) int64: which response of the bank DIR convolves the clip with, -1: none
    shift: Tensor | None  # (B,) int64, samples to the right
    lam: Tensor | None  # (B,) float32: mixup's weight of the clip's own wave
    partner: Tensor | None  # (B,) int64: the clip that it is mixed with
    freq_mask: Tensor | None  # (B, 2) float32
    time_mask: Tensor | None  # (B, 2) float32
    style_weight: Tensor | None  # (B,) float32: Freq-MixStyle's weight of the clip's own statistics
    style_partner: Tensor | None  # (B,) int64: the clip whose statistics they are mixed with

    def packed(self) -> Tensor:
        """Return all choices side by side, (B, C) float64, which holds each exactly: they move to a GPU in one copy."""
        return torch.cat([value.double().reshape(len(value), -1) for value in self._tensors().values()], dim=1)

    def unpacked(self, columns: Tensor) -> "Draw":
        """Return the draw that `packed` turned into `columns`: it lies where they do and has the types of this one."""
        parts, start = {}, 0
        for name, value in self._tensors().items():
            width = value[0].numel()
            parts[name] = columns[:, start : start + width].reshape(-1, *value.shape[1:]).to(value.dtype)
            start += width
        return replace(self, **parts)

    @property
    def width(self) -> int:
        """The number of columns C that `packed` returns."""
        return sum(value[0].numel() for value in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class Augment:
    """Draws augmentations on the host (`draw`) and applies them to batches on any device (`wave`, `mel`).

    mean_energy: the training set's mean energy, which is the ADIR threshold `auto`.
    Raises ConfigError for a mask wider than a one-second log-mel.
    """

    def __init__(
        self, config: AugmentConfig, frontend: AnyFrontendConfig, bank: ImpulseBank, mean_energy: float
    ) -> None:
        check_masks(config, frontend)
        self.config = config
        self._bank = bank
        self._threshold = mean_energy if config.dir.threshold == "auto" else config.dir.threshold
        self._second, self._masked = frontend.clip_samples, frontend.masked
        self._fmax_steps = int(frontend.fmax_jitter / 2 / FMAX_STEP)
        self._spectra: dict[tuple[int, torch.device], tuple[int, Tensor]] = {}

    def draw(self, energies: Tensor, devices: list[str], generator: torch.Generator) -> Draw:
        """Return the choices for clips with these energies (B,), sums of x^2 in +-1 scale, and these devices.

        One number is taken from the (CPU) generator, and each augmentation grows its own random stream from it. So
        changing one, or switching it off, leaves the others' choices as they were.
        """
        config, clips = self.config, len(devices)
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
        fmax, dir_, roll, mixup, freq, time, style, crop = np.random.default_rng(seed).spawn(8)
        fmax_shift = FMAX_STEP * int(fmax.integers(-self._fmax_steps, self._fmax_steps + 1))
        lam, partner = _draw_mix(mixup, 1.0, config.mixup_alpha, clips) if config.mixup_alpha else (None, None)
        p, alpha = config.freq_mixstyle.p, config.freq_mixstyle.alpha
        style_weight, style_partner = _draw_mix(style, p, alpha, clips) if p else (None, None)
        return Draw(
            fmax_shift=torch.full((clips,), float(fmax_shift)),
            start=torch.from_numpy(crop.integers(0, self._second, clips)) if config.crop else None,
            response=self._draw_dir(dir_, energies, devices) if config.dir.p else None,
            shift=torch.from_numpy(roll.integers(-config.roll, config.roll + 1, clips)) if config.roll else None,
            lam=lam,
            partner=partner,
            freq_mask=_draw_mask(freq, config.freq_mask, clips) if config.freq_mask else None,
            time_mask=_draw_mask(time, config.time_mask, clips) if config.time_mask else None,
            style_weight=style_weight,
            style_partner=style_partner,
        )

    def _draw_dir(self, rng: np.random.Generator, energies: Tensor, devices: list[str]) -> Tensor:
        """Return each clip's response (B,) by eq. 3: drawn with probability p if E(x) > T or there is no T, else -1."""
        chosen = torch.from_numpy(rng.random(len(devices)) < self.config.dir.p)
        response = torch.from_numpy(rng.integers(len(self._bank.names), size=len(devices)))
        if self.config.dir.apply_to != "all":
            chosen &= torch.tensor([device in self.config.dir.apply_to for device in devices], dtype=torch.bool)
        if self._threshold is not None:
            chosen &= energies.double() > self._threshold
        return torch.where(chosen, response, -1)

    @torch.no_grad()
    def wave(self, wave: Tensor, draw: Draw) -> Tensor:
        """Apply crop, DIR, roll and mixup to waveforms (B, T) float32, as drawn; the input is left as it is.

        To be cropped, they are (B, 2 T): each clip, and the second that follows it or the clip again.
        """
        if draw.start is not None:
            wave = _windows(wave, draw.start, wave.shape[1] // 2)
        if draw.response is not None:
            wave = self._convolved(wave, draw.response)
        if draw.shift is not None:
            wave = _roll(wave, draw.shift)
        if draw.lam is not None and draw.partner is not None:
            wave = torch.lerp(wave[draw.partner], wave, draw.lam[:, None])
        return wave

    @torch.no_grad()
    def mel(self, mel: Tensor, draw: Draw) -> Tensor:
        """Apply the masks, then Freq-MixStyle, to log-mels (B, 1, F, T), as drawn."""
        if draw.freq_mask is not None:
            mel = mel.masked_fill(_masked(draw.freq_mask, mel.shape[2])[:, None, :, None], self._masked)
        if draw.time_mask is not None:
            mel = mel.masked_fill(_masked(draw.time_mask, mel.shape[3])[:, None, None, :], self._masked)
        if draw.style_weight is not None and draw.style_partner is not None:
            mel = _freq_mixstyle(mel, draw.style_weight, draw.style_partner)
        return mel

    def _convolved(self, wave: Tensor, response: Tensor) -> Tensor:
        """Convolve the clips of a batch (B, T) that have a response (B,)."""
        if wave.device.type != "cpu":  # counting them would wait for the GPU, so all are convolved and some are taken
            return torch.where((response >= 0)[:, None], self._convolve(wave, response.clamp(min=0)), wave)
        chosen = (response >= 0).nonzero()[:, 0]
        if not len(chosen):
            return wave
        return wave.index_copy(0, chosen, self._convolve(wave[chosen], response[chosen]))

    def _convolve(self, wave: Tensor, response: Tensor) -> Tensor:
        """Convolve waves (K, T) with the bank's responses of these indices (K,), cut to T samples."""
        samples = wave.shape[1]
        size, spectra = self._response_spectra(samples, wave.device)
        spectrum = torch.fft.rfft(wave, n=size).mul_(spectra.index_select(0, response))
        return torch.fft.irfft(spectrum, n=size)[:, :samples]

    def _response_spectra(self, samples: int, device: torch.device) -> tuple[int, Tensor]:
        """Return the FFT size for clips of `samples` samples, and the bank's spectra (N, size // 2 + 1), made once."""
        key = (samples, device)
        if key not in self._spectra:
            # A response's samples beyond the clip's length cannot reach the part that is kept.
            responses = self._bank.responses[:, :samples].to(device)
            size = fft_size(samples + responses.shape[1] - 1)
            self._spectra[key] = size, torch.fft.rfft(responses, n=size)
        return self._spectra[key]


def _draw_mix(rng: np.random.Generator, p: float, alpha: float, clips: int) -> tuple[Tensor, Tensor]:
    """Draw (clips,) weights, Beta(alpha, alpha) with probability p and else 1, and (clips,) partners, a permutation."""
    drawn = rng.random(clips) < p
    weight = np.where(drawn, rng.beta(alpha, alpha, clips), 1.0)
    return torch.from_numpy(weight).float(), torch.from_numpy(rng.permutation(clips))


def _draw_mask(rng: np.random.Generator, widest: int, clips: int) -> Tensor:
    """Draw (clips, 2): the width, uniform in 0..widest, and the relative start, uniform in [0, 1)."""
    width, relative = rng.integers(0, widest + 1, clips), rng.random(clips, dtype=np.float32)
    return torch.from_numpy(np.stack([width.astype(np.float32), relative], axis=1))


def _masked(mask: Tensor, size: int) -> Tensor:
    """Turn masks (B, 2) of a Draw into (B, size) bool, true where masked."""
    width, relative = mask[:, :1], mask[:, 1:]
    start = ((size - width + 1) * relative).floor()
    at = torch.arange(size, device=mask.device)
    return (start <= at) & (at < start + width)


def _roll(wave: Tensor, shift: Tensor) -> Tensor:
    """Rotate each clip (B, T) to the right by its shift (B,): read T samples of the clip and its copy, from -shift."""
    samples = wave.shape[1]
    return _windows(torch.cat([wave, wave], dim=1), torch.remainder(-shift, samples), samples)


def _windows(wave: Tensor, start: Tensor, samples: int) -> Tensor:
    """Return (B, samples) of each wave (B, T), from its start (B,) on."""
    return wave.unfold(1, samples, 1)[torch.arange(len(wave), device=wave.device), start]


def _freq_mixstyle(mel: Tensor, weight: Tensor, partner: Tensor) -> Tensor:
    """Return (x - mu) / sigma * sigma_mix + mu_mix, with statistics (B, 1, F, 1) over channel and time.

    It is computed as x * ratio + offset. With a weight of 1 the ratio is exactly 1 and the offset 0: no bit changes.
    """
    mean = mel.mean(dim=(1, 3), keepdim=True)
    squares = (mel - mean).square_().sum(dim=(1, 3), keepdim=True)  # torch.var_mean takes three times as long on a CPU
    sigma = (squares / (mel.shape[1] * mel.shape[3] - 1) + 1e-6).sqrt()
    weight = weight[:, None, None, None]
    ratio = torch.lerp(sigma[partner], sigma, weight) / sigma
    return torch.addcmul(torch.lerp(mean[partner], mean, weight) - mean * ratio, mel, ratio)
