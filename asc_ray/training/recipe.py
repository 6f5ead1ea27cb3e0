"""A recipe: all that defines one training, except its data."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from asc_ray.audio.augment import AugmentConfig, check_masks
from asc_ray.audio.frontend import FrontendConfig
from asc_ray.audio.frontends import AnyFrontendConfig, WaveConfig
from asc_ray.errors import ConfigError
from asc_ray.models import cnn_gru
from asc_ray.models.dcase22_baseline import FRAMES, MELS, DCASE22BaselineConfig
from asc_ray.models.own import ModuleConfig
from asc_ray.models.passt import PasstConfig
from asc_ray.models.registry import AnyModelConfig
from asc_ray.section import Section, absolute
from asc_ray.training.optimizer import OptimizerConfig

Precision = Literal["bf16", "tf32", "fp32"]


class Recipe(Section):
    """All that defines one training, except its data."""

    later = frozenset({"precision", "deterministic", "label_smoothing", "init"})
    model: AnyModelConfig = Field(discriminator="name", description="the network, and its settings")
    init: Path | None = Field(
        None,
        description="folder of a finished student or teacher, or a file of weights, to start from; where its scenes "
        "are others the head is made anew",
    )
    frontend: AnyFrontendConfig = Field(FrontendConfig(), description="what the network is given of a clip")
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: float = Field(
        0.0, ge=0.0, le=1.0, description="0: an epoch has every clip once; 1: it has equally many clips of every device"
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of each label that is spread evenly over all scenes"
    )
    compile: bool = Field(False, description="torch.compile the network; where that fails, train without it")
    precision: Precision = Field("bf16", description="arithmetic of the training on a GPU; on a CPU it is fp32")
    deterministic: bool = Field(
        False, description="a GPU gives the same bits in every run, but is slower; a CPU always gives the same bits"
    )
    select: Literal["last", "best"] = Field(
        "last", description="weights that are the result: the last epoch's, or those best on the validation part"
    )
    seed: int = Field(0, ge=0, description="seed of the first weights and of all that is drawn")

    @field_validator("init")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and absolute(value)  # because workers run in a folder of their own

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        try:
            check_masks(self.augment, self.frontend)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.select == "best" and self.optimizer.average_epochs > 1:
            raise ValueError(
                "select: best, and optimizer.average_epochs > 1 averages the last ones; choose one of them"
            )
        if self.init and isinstance(self.model, PasstConfig) and self.model.pretrained:
            raise ValueError("init: model.pretrained is a network to start from, too; choose one of them")
        if isinstance(self.frontend, WaveConfig):
            if not isinstance(self.model, ModuleConfig):
                raise ValueError(
                    f"frontend.kind: wave, and {self.model.name} takes a log-mel; choose logmel, or your own module"
                )
            return self
        mels, frames = self.frontend.mels, self.frontend.frames(self.frontend.clip_samples)
        if isinstance(self.model, DCASE22BaselineConfig) and (mels, frames) != (MELS, FRAMES):
            raise ValueError(
                f"frontend makes {mels} mels x {frames} frames of a clip, dcase22_baseline takes {MELS} x {FRAMES}; "
                "use student.preset: dcase22_baseline, or change frontend.mels and frontend.hop"
            )
        if isinstance(self.model, cnn_gru.CNNGRUConfig) and mels != cnn_gru.MELS:
            raise ValueError(
                f"frontend makes {mels} mels of a clip, cnn_gru takes {cnn_gru.MELS}; use student.preset: cnn_gru, or "
                "change frontend.mels"
            )
        if isinstance(self.model, PasstConfig) and (self.model.mels != mels or self.model.frames < frames):
            raise ValueError(
                f"frontend makes {mels} mels x {frames} frames of a clip, model takes {self.model.mels} x at most "
                f"{self.model.frames}; change frontend.mels, frontend.hop, model.mels or model.frames"
            )
        return self
