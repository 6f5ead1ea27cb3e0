"""A recipe, all that defines one training except its data, and the sections of which it is made."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from asc_ray.audio.config import AnyFrontendConfig, AugmentConfig, FrontendConfig, WaveConfig, check_masks
from asc_ray.errors import ConfigError
from asc_ray.models.config import AnyModelConfig, CNNGRUConfig, DCASE22BaselineConfig, ModuleConfig, PasstConfig
from asc_ray.section import Section, absolute

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["bf16", "tf32", "fp32"]


class ScheduleConfig(Section):
    """Exponential warm-up, plateau, linear ramp-down to `last_factor`; all lengths in epochs."""

    warm_up: int = Field(3, ge=0, description="epochs of the warm-up")
    ramp_down_start: int = Field(15, ge=0, description="epochs before the rate begins to fall")
    ramp_down_length: int = Field(12, ge=1, description="epochs over which it falls")
    last_factor: float = Field(0.005, ge=0.0, le=1.0, description="share of the rate after the ramp-down")


class OptimizerConfig(Section):
    """One optimizer and one learning-rate schedule for the whole network."""

    kind: Literal["adamw", "adam"] = Field(
        "adamw", description="adam adds the weight decay to the gradient (L2), adamw takes it from the weights"
    )
    epochs: int = Field(30, ge=1, description="passes over the training clips")
    batch_size: int = Field(64, ge=2, description="clips a step")
    learning_rate: float = Field(1e-3, gt=0.0, le=1.0, description="largest learning rate; the schedule scales it")
    weight_decay: float = Field(1e-3, ge=0.0, le=1.0, description="weight decay, applied as `kind` says")
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: float = Field(5.0, gt=0.0, description="largest norm of the gradient over all weights")
    accumulate: int = Field(1, ge=1, description="parts in which a batch goes through the network, for less memory")
    average_epochs: int = Field(1, ge=1, description="number of last epochs whose weights are averaged; 1: no average")

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> "OptimizerConfig":
        if self.average_epochs > self.epochs:
            raise ValueError(f"average_epochs: {self.average_epochs} of {self.epochs} epochs")
        return self

    def scaled_to(self, epochs: int) -> "OptimizerConfig":
        """Return this configuration for `epochs` epochs, with its schedule compressed or stretched to them."""
        ratio = epochs / self.epochs
        schedule = ScheduleConfig(
            warm_up=round(self.schedule.warm_up * ratio),
            ramp_down_start=round(self.schedule.ramp_down_start * ratio),
            ramp_down_length=max(1, round(self.schedule.ramp_down_length * ratio)),
            last_factor=self.schedule.last_factor,
        )
        average = max(1, round(self.average_epochs * ratio))
        return self.model_copy(update={"epochs": epochs, "schedule": schedule, "average_epochs": average})


class ScheduledWeight(Section):
    """A weight that goes from `start` in the first epoch to `end` in the last."""

    start: Share = Field(description="weight in the first epoch")
    end: Share = Field(description="weight in the last epoch")
    shape: Literal["linear", "cosine"] = Field("linear", description="shape of the curve between them")


class LearnedWeight(Section):
    """A weight between `low` and `high` that is trained with the network, by the same objective."""

    start: Share = Field(description="weight before the first step")
    low: Share = Field(0.0, description="lower bound of the weight")
    high: Share = Field(1.0, description="upper bound of the weight")

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if not self.low < self.start < self.high:
            raise ValueError(f"low {self.low:g} < start {self.start:g} < high {self.high:g} must hold")
        return self


def _kind(value: Any) -> str:
    """Return the tag of the form in which a weight is given."""
    if not isinstance(value, dict | Section):
        return "(number)"
    return "(schedule)" if {"end", "shape"} & dict(value).keys() else "(learned)"


LabelWeight = Annotated[
    Annotated[Share, Tag("(number)")]
    | Annotated[ScheduledWeight, Tag("(schedule)")]
    | Annotated[LearnedWeight, Tag("(learned)")],
    Discriminator(_kind),
]


class DistillationConfig(Section):
    """What a student learns from.

    `soft_target`: `none`, `average`, `fused`, or the name of one teacher system.

    `label_weight` is lambda of eq. 5, the share of the label loss: a number, `{start, end, shape}` over the epochs, or
    `{start, low, high}` to learn it.
    """

    soft_target: str = Field("fused", description="whose logits the student learns from")
    label_weight: LabelWeight = Field(0.17, description="share of the label loss, lambda of eq. 5")
    temperature: float = Field(2.0, gt=0.0, le=100.0, description="divisor of the student's and the teachers' logits")


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
        if isinstance(self.model, DCASE22BaselineConfig) and (mels, frames) != (self.model.mels, self.model.frames):
            raise ValueError(
                f"frontend makes {mels} mels x {frames} frames of a clip, dcase22_baseline takes {self.model.mels} x "
                f"{self.model.frames}; use student.preset: dcase22_baseline, or change frontend.mels and frontend.hop"
            )
        if isinstance(self.model, CNNGRUConfig) and mels != self.model.mels:
            raise ValueError(
                f"frontend makes {mels} mels of a clip, cnn_gru takes {self.model.mels}; use student.preset: cnn_gru, "
                "or change frontend.mels"
            )
        if isinstance(self.model, PasstConfig) and (self.model.mels != mels or self.model.frames < frames):
            raise ValueError(
                f"frontend makes {mels} mels x {frames} frames of a clip, model takes {self.model.mels} x at most "
                f"{self.model.frames}; change frontend.mels, frontend.hop, model.mels or model.frames"
            )
        return self
