"""Log-mel front end of the students and of the published teachers (READING.md "Input"; CP-JKU's `AugmentMelSTFT`).

x[t] - 0.97 x[t-1]  ->  centred STFT, power  ->  Kaldi mel bank  ->  log(mel + 1e-5)  ->  (x + 4.5) / 5
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from asc_ray.audio.config import FrontendConfig
from asc_ray.runtime.frontend import mel_bank

# Shifts of the upper mel edge are multiples of this many Hz, so that a run meets few mel banks and each is built once.
FMAX_STEP = 50.0

# Mel bins per matrix product: their triangles share a narrow band of FFT bins, the rest of the bank is zero. Groups are
# larger on a GPU, because starting a product takes it longer than computing one.
_GROUP = 16
_GPU_GROUP = 64
# Clips per pass on the CPU: a pass's spectra stay in the L2 cache, which is 2.5 times as fast as whole batches.
_CPU_SLAB = 4

_Group = tuple[int, int, Tensor]  # columns start..stop of the squares, and weights (stop - start, mels of the group)


class LogMel(nn.Module):
    """Turns waveforms into log-mels; it has no weights and gives no gradient."""

    window: Tensor

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.window, periodic=False), persistent=False)
        self._banks: dict[float, list[_Group]] = {}
        self._shifted: list[_Group] = []

    @torch.no_grad()
    def forward(self, wave: Tensor, fmax_shift: Tensor | None = None) -> Tensor:
        """Turn (..., T) float32 in +-1 into (..., mels, 1 + (T - 1) // hop) float32, as torchaudio's transforms do.

        A network takes a channel: wave[:, None] of (B, T) gives (B, 1, mels, frames).
        fmax_shift: (B,) Hz added to the upper mel edge in training; the first item holds for all. It is a multiple of
        FMAX_STEP within the configured range; the edge never passes the Nyquist frequency.
        Raises ValueError where T is too short for the reflected edges of the centred STFT.
        """
        *leading, samples = wave.shape
        if samples <= self.config.window // 2 + 1:
            raise ValueError(f"a clip of {samples} samples is too short for a window of {self.config.window}")
        clips = wave.reshape(-1, samples)
        if wave.device.type == "cpu":
            bank = self._bank(0.0 if fmax_shift is None else float(fmax_shift[0]))
            mel = torch.cat([self._transform(part, bank) for part in clips.split(_CPU_SLAB)])
        else:
            tf32 = torch.backends.cuda.matmul.allow_tf32  # a training may allow it, but a log-mel would lose digits
            torch.backends.cuda.matmul.allow_tf32 = False
            try:
                mel = self._transform(clips, self._bank_there(wave.device, fmax_shift))
            finally:
                torch.backends.cuda.matmul.allow_tf32 = tf32
        return mel.view(*leading, *mel.shape[1:])

    def _transform(self, wave: Tensor, bank: list[_Group]) -> Tensor:
        config = self.config
        wave = wave[:, 1:] - 0.97 * wave[:, :-1]
        # torch.stft centres the window in n_fft samples. The power does not depend on where the window stands, so only
        # the samples under it are cut out, and the zeros follow them.
        left = config.n_fft // 2 - (config.n_fft - config.window) // 2
        wave = functional.pad(wave[:, None], (left, config.window - left), mode="reflect")[:, 0]
        frames = wave.unfold(1, config.window, config.hop)
        clips, count, _ = frames.shape
        padded = wave.new_zeros(clips, count, config.n_fft)
        torch.mul(frames, self.window, out=padded[..., : config.window])
        # re^2 and im^2 stay side by side: the bank has every row twice, which is cheaper than adding them up first.
        squares = torch.view_as_real(torch.fft.rfft(padded)).square_().view(clips * count, -1)
        mel = torch.cat([squares[:, start:stop] @ weights for start, stop, weights in bank], dim=1)
        mel = mel.add_(1e-5).log_().add_(4.5).div_(5.0)
        return mel.view(clips, count, config.mels).transpose(1, 2).contiguous()

    def _bank(self, fmax_shift: float) -> list[_Group]:
        """Return the mel bank in groups, on the host."""
        if fmax_shift not in self._banks:
            self._banks[fmax_shift] = _groups(self._matrix(fmax_shift)[None], _GROUP)
        return [(start, stop, weights[0]) for start, stop, weights in self._banks[fmax_shift]]

    def _bank_there(self, device: torch.device, fmax_shift: Tensor | None) -> list[_Group]:
        """Return the mel bank in groups on a GPU. All shifted banks lie there, so a tensor can select one."""
        most = int(self.config.fmax_jitter / 2 / FMAX_STEP)
        if not self._shifted:
            banks = torch.stack([self._matrix(FMAX_STEP * steps) for steps in range(-most, most + 1)])
            groups = _groups(banks, _GPU_GROUP)
            self._shifted = [(start, stop, weights.to(device)) for start, stop, weights in groups]
        if fmax_shift is None:
            return [(start, stop, weights[most]) for start, stop, weights in self._shifted]
        which = (fmax_shift[:1] / FMAX_STEP).round().long() + most
        return [(start, stop, weights.index_select(0, which)[0]) for start, stop, weights in self._shifted]

    def _matrix(self, fmax_shift: float) -> Tensor:
        c = self.config
        return torch.from_numpy(
            mel_bank(c.sample_rate, c.n_fft, c.mels, c.fmin, min(c.fmax + fmax_shift, c.sample_rate / 2))
        )


def _groups(banks: Tensor, mels: int) -> list[_Group]:
    """Cut banks (N, mels, bins) into groups of mels: for each the bins that any of the N banks uses, and weights
    (N, 2 bins, mels) that have every row twice."""
    groups = []
    for bank in banks.split(mels, dim=1):
        used = bank.amax(dim=(0, 1)).nonzero()
        start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        weights = bank[..., start:stop].transpose(1, 2).repeat_interleave(2, dim=1).contiguous()
        groups.append((2 * start, 2 * stop, weights))
    return groups
