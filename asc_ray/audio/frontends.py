"""What a network is given of a clip, by `frontend.kind`: a log-mel, Kaldi's log filter bank, or the wave itself."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from asc_ray.audio.frontend import WAVE_RATE, FrontendConfig, LogMel
from asc_ray.audio.kaldi import AtRate, KaldiFbank, KaldiFbankConfig
from asc_ray.section import Section


class WaveConfig(Section):
    """The wave itself, for networks that have a front end of their own."""

    fmax_jitter: ClassVar[float] = 0.0
    clip_samples: ClassVar[int] = WAVE_RATE
    masked: ClassVar[float] = 0.0

    kind: Literal["wave"] = Field(description="the wave itself, in +-1")
    sample_rate: int = Field(WAVE_RATE, ge=1, le=WAVE_RATE, description="the waveform is resampled to this rate")

    def frames(self, samples: int) -> int:
        """Return how many samples a waveform of `samples` samples at 32 kHz has."""
        return round(samples * self.sample_rate / WAVE_RATE)

    def shape(self, samples: int) -> tuple[int, ...]:
        """Return the shape of a network's input for such a waveform: (samples,)."""
        return (self.frames(samples),)


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


def _kind(raw: Any) -> str:
    return str(raw.get("kind", "logmel") if isinstance(raw, Mapping) else getattr(raw, "kind", "logmel"))


AnyFrontendConfig = Annotated[
    Annotated[FrontendConfig, Tag("logmel")]
    | Annotated[KaldiFbankConfig, Tag("kaldi_fbank")]
    | Annotated[WaveConfig, Tag("wave")],
    Discriminator(
        _kind,
        custom_error_type="frontend_kind",
        custom_error_message="unknown kind; allowed: logmel, kaldi_fbank, wave",
    ),
]
FRONT_ENDS: dict[str, type[LogMel | KaldiFbank | Wave]] = {"logmel": LogMel, "kaldi_fbank": KaldiFbank, "wave": Wave}
FrontEnd = LogMel | KaldiFbank | Wave


def front_end(config: Any) -> FrontEnd:
    """Return the front end of a configuration."""
    return FRONT_ENDS[config.kind](config)


def laid_out(features: Tensor) -> Tensor:
    """Lay the channels of a log-mel (B, 1, F, T) last, as convolutions want them; a wave (B, T) has none."""
    return features.contiguous(memory_format=torch.channels_last) if features.ndim == 4 else features
