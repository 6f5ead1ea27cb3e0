"""What a network is given of a clip, by `frontend.kind`: a log-mel, Kaldi's log filter bank, or the wave itself."""

from typing import Any

import torch
from torch import Tensor, nn

from asc_ray.audio.config import WaveConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.kaldi import AtRate, KaldiFbank


class Wave(nn.Module):
    """Gives a network the wave; it has no weights and gives no gradient."""

    def __init__(self, config: WaveConfig) -> None:
        super().__init__()
        self.config = config
        self.resampler = AtRate(config.sample_rate)

    @torch.no_grad()
    def forward(self, wave: Tensor, fmax_shift: Tensor | None = None) -> Tensor:
        """Turn (B, 1, T) float32 in +-1 at 32 kHz into (B, samples). `fmax_shift` changes nothing."""
        return self.resampler(wave[:, 0])


FRONT_ENDS: dict[str, type[LogMel | KaldiFbank | Wave]] = {"logmel": LogMel, "kaldi_fbank": KaldiFbank, "wave": Wave}
FrontEnd = LogMel | KaldiFbank | Wave


def front_end(config: Any) -> FrontEnd:
    """Return the front end of a configuration."""
    return FRONT_ENDS[config.kind](config)


def laid_out(features: Tensor) -> Tensor:
    """Lay the channels of a log-mel (B, 1, F, T) last, as convolutions want them; a wave (B, T) has none."""
    return features.contiguous(memory_format=torch.channels_last) if features.ndim == 4 else features
