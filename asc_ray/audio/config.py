"""The sections of front ends, and of the augmentation of training batches."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from asc_ray.errors import ConfigError
from asc_ray.section import Section

WAVE_RATE = 32_000  # Hz, of the waveforms that front ends are given; a clip has a second

# What a masked cell holds after the front end. The published code writes 0 into the log-mel *before* the last affine
# step; our masks are applied to the front end's output, so they write that zero's image, (0 + 4.5) / 5.
MASKED = (0.0 + 4.5) / 5.0


class FrontendConfig(Section):
    """Log-mel settings; the defaults are the student's. Frequencies in Hz, `n_fft`, `window`, `hop` in samples."""

    kind: ClassVar[str] = "logmel"  # a configuration may leave it out, and files and keys do
    masked: ClassVar[float] = MASKED

    sample_rate: int = Field(32_000, ge=1, description="samples a second of the waveform")
    n_fft: int = Field(4096, ge=4, multiple_of=2, description="length of the Fourier transform")
    window: int = Field(3072, ge=2, description="length of the window")
    hop: int = Field(500, ge=1, description="step from one frame to the next")
    mels: int = Field(256, ge=1, description="mel bins")
    fmin: float = Field(0.0, ge=0, description="lower edge of the first mel bin")
    fmax: float = Field(15_500.0, gt=0, description="upper edge of the last mel bin")
    fmax_jitter: float = Field(1000.0, ge=0, description="width in Hz of the range of `fmax` in training, 0: off")

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("kind") == cls.kind:
            return {key: value for key, value in raw.items() if key != "kind"}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> "FrontendConfig":
        if self.window > self.n_fft:
            raise ValueError(f"window {self.window} must not exceed n_fft {self.n_fft}")
        if not self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(
                f"fmin {self.fmin} < fmax {self.fmax} <= half the sample rate {self.sample_rate / 2} must hold"
            )
        if self.fmax - self.fmax_jitter / 2 <= self.fmin:
            raise ValueError(f"fmax_jitter {self.fmax_jitter} moves fmax {self.fmax} below fmin {self.fmin}")
        return self

    def frames(self, samples: int) -> int:
        """Return how many frames a waveform of `samples` samples gives; pre-emphasis takes one sample."""
        return 1 + (samples - 1) // self.hop

    @property
    def clip_samples(self) -> int:
        """The samples of a clip of a second."""
        return self.sample_rate

    def shape(self, samples: int) -> tuple[int, ...]:
        """Return the shape of a network's input for such a waveform: (1, mels, frames)."""
        return 1, self.mels, self.frames(samples)


class KaldiFbankConfig(Section):
    """Kaldi's log filter bank; the defaults are AST's and EAT's. Frequencies in Hz, `window` and `hop` in samples."""

    fmax_jitter: ClassVar[float] = 0.0
    clip_samples: ClassVar[int] = WAVE_RATE

    kind: Literal["kaldi_fbank"] = Field(description="Kaldi's log filter bank")
    sample_rate: int = Field(16_000, ge=1, le=WAVE_RATE, description="the waveform is resampled to this rate")
    window: int = Field(400, ge=2, description="length of a frame")
    hop: int = Field(160, ge=1, description="step from one frame to the next")
    window_type: Literal["hanning", "povey", "hamming", "rectangular"] = Field(
        "hanning", description="Kaldi's window; BEATs has povey"
    )
    mels: int = Field(128, ge=4, description="mel bins")
    fmin: float = Field(20.0, ge=0, description="lower edge of the first mel bin")
    fmax: float = Field(8000.0, gt=0, description="upper edge of the last mel bin")
    scale: float = Field(1.0, gt=0, description="factor of the waveform, which is in +-1; BEATs has 32768")
    mean: float = Field(-4.2677393, description="subtracted from the logarithms; BEATs has 15.41663")
    std: float = Field(4.5689974, gt=0, description="they are divided by twice this; BEATs has 6.55582")

    @model_validator(mode="after")
    def _consistent(self) -> "KaldiFbankConfig":
        if not self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(
                f"fmin {self.fmin} < fmax {self.fmax} <= half the sample rate {self.sample_rate / 2} must hold"
            )
        if self.window > self.sample_rate:
            raise ValueError(f"window {self.window} is longer than a clip, {self.sample_rate} samples")
        return self

    @property
    def masked(self) -> float:
        """What a masked cell holds: the logarithm 0, as the published trainings write it, after the normalization."""
        return -self.mean / (2 * self.std)

    def frames(self, samples: int) -> int:
        """Return how many whole frames a waveform of `samples` samples at 32 kHz has."""
        return 1 + (round(samples * self.sample_rate / WAVE_RATE) - self.window) // self.hop

    def shape(self, samples: int) -> tuple[int, ...]:
        """Return the shape of a network's input for such a waveform: (1, mels, frames)."""
        return 1, self.mels, self.frames(samples)


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


def _kind(raw: Any) -> str:
    return str(raw.get("kind", "logmel") if isinstance(raw, Mapping) else getattr(raw, "kind", "logmel"))


FRONT_END_KINDS = ("logmel", "kaldi_fbank", "wave")
AnyFrontendConfig = Annotated[
    Annotated[FrontendConfig, Tag("logmel")]
    | Annotated[KaldiFbankConfig, Tag("kaldi_fbank")]
    | Annotated[WaveConfig, Tag("wave")],
    Discriminator(
        _kind,
        custom_error_type="frontend_kind",
        custom_error_message=f"unknown kind; allowed: {', '.join(FRONT_END_KINDS)}",
    ),
]

Probability = Annotated[float, Field(ge=0, le=1)]


class DirConfig(Section):
    """Device impulse response augmentation; adaptive (ADIR, eq. 3) where a threshold is given."""

    p: Probability = Field(0.0, description="probability that a clip is convolved, if it may be")
    threshold: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        None, description="convolve only clips of more energy than this; auto: the training set's mean; null: all clips"
    )
    apply_to: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("a",), description="devices whose clips may be convolved"
    )


class FreqMixStyleConfig(Section):
    """Freq-MixStyle of the log-mel; the mixing weight is Beta(alpha, alpha)."""

    p: Probability = Field(0.0, description="probability that a clip's statistics are mixed with another's")
    alpha: float = Field(0.3, gt=0, description="the smaller it is, the less evenly two clips mix")


class AugmentConfig(Section):
    """Augmentation of training batches; the default augments nothing."""

    later: ClassVar[frozenset[str]] = frozenset({"crop"})
    crop: bool = Field(
        False,
        description="whether a clip starts anywhere in its second and goes on in its recording's next one, if that was "
        "recorded by the same device and is in the same part; else it is rotated",
    )
    roll: int = Field(0, ge=0, description="largest rotation of the waveform either way, samples")
    dir: DirConfig = DirConfig()
    freq_mixstyle: FreqMixStyleConfig = FreqMixStyleConfig()
    freq_mask: int = Field(0, ge=0, description="widest frequency mask, mel bins")
    time_mask: int = Field(0, ge=0, description="widest time mask, frames")
    mixup_alpha: float = Field(0.0, ge=0, description="waveform mixup with weight Beta(alpha, alpha), 0: off")


def check_masks(config: AugmentConfig, frontend: AnyFrontendConfig) -> None:
    """Raise ConfigError for a mask wider than a one-second log-mel, and for one of a wave, which has no log-mel."""
    if isinstance(frontend, WaveConfig):
        if config.freq_mask or config.time_mask or config.freq_mixstyle.p:
            raise ConfigError(
                "augment.freq_mask, augment.time_mask and augment.freq_mixstyle.p change a log-mel, and frontend.kind: "
                "wave makes none; set them to 0"
            )
        return
    limits = {"freq_mask": frontend.mels, "time_mask": frontend.frames(frontend.clip_samples)}
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            raise ConfigError(
                f"augment.{name} is {getattr(config, name)}, but the front end's log-mel has {limit} "
                f"{'mel bins' if name == 'freq_mask' else 'frames'}; lower it to {limit} or less"
            )
