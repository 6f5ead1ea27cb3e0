"""A student's configuration, a recipe and its soft targets, and the limits of its device."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from asc_ray.audio.config import FrontendConfig
from asc_ray.config.overrides import apply_overrides
from asc_ray.models.config import ModelConfig
from asc_ray.section import Section
from asc_ray.training.config import DistillationConfig, Recipe


class SpecializeConfig(Section):
    """The fine-tuning of a finished student for each known device; unknown devices have the general student."""

    by: Literal["device"] = Field("device", description="what a student is specialized for")
    epochs: int = Field(10, ge=1, description="passes over a device's clips; the student's schedule is scaled to them")
    learning_rate: float = Field(1e-3, gt=0.0, le=1.0, description="replaces the student's; its schedule stays")
    weights: Literal["all", "head_and_normalizations"] = Field(
        "all", description="what is fine-tuned, and kept once for each device"
    )


class StudentConfig(Recipe):
    """A recipe and its soft targets."""

    later = Recipe.later | {"specialize"}
    # What a bundle can be made of: no code of the user's own, and the front end that devices have.
    model: ModelConfig = Field(description="the network, and its settings")
    frontend: FrontendConfig = FrontendConfig()
    checkpoint: Path | None = Field(None, description="published checkpoint that is taken instead of a training")
    seeds: int = Field(1, ge=1, le=100, description="number of students; they have `seed` and the seeds after it")
    distillation: DistillationConfig = DistillationConfig()
    specialize: SpecializeConfig | None = Field(
        None, description="fine-tuning for each device, when the student is finished; null: none"
    )

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        if self.checkpoint and self.seeds > 1:
            raise ValueError(f"seeds: {self.seeds}, but a student from a checkpoint is not trained; allowed is 1")
        if self.checkpoint and self.init:
            raise ValueError("init: a student from a checkpoint is not trained, so it starts from nothing; give one")
        return self


def changed(student: StudentConfig, values: Mapping[str, Any]) -> StudentConfig:
    """Return the student's configuration with these values, by key, laid over it."""
    raw = student.model_dump()
    apply_overrides(raw, values)
    return StudentConfig.model_validate(raw)


def _number(value: Any) -> Any:
    """Read 30e6 as a number, although YAML takes it for text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


Count = Annotated[int, BeforeValidator(_number)]


class Limits(Section):
    """What a device allows a student; the defaults are DCASE's."""

    bytes: Count = Field(128_000, ge=1, description="bytes of the parameters as int8")
    macs: Count = Field(30_000_000, ge=1, description="multiply-accumulates for one clip")
