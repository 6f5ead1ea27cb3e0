"""What a network costs on a device, and whether it keeps the device's limits."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from asc_ray.data.clips import CLIP_SAMPLES
from asc_ray.errors import ConfigError
from asc_ray.models.complexity import Complexity, complexity
from asc_ray.models.registry import build
from asc_ray.section import Section
from asc_ray.training.recipe import Recipe


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

    def exceeded(self, cost: Complexity) -> list[str]:
        """Return, in words, which limits are exceeded; empty if none is."""
        found = {"bytes": cost.bytes["int8"], "macs": cost.macs}
        return [
            f"limits.{name}: {found[name]:,}, allowed {limit:,}"
            for name, limit in (("bytes", self.bytes), ("macs", self.macs))
            if found[name] > limit
        ]


def network_cost(recipe: Recipe, scenes: int) -> Complexity:
    """Return what the recipe's network costs on its front end. Raises ConfigError where the two do not fit."""
    shape = input_shape(recipe)
    try:
        return complexity(build(recipe.model, scenes), shape)
    except (RuntimeError, ValueError):
        mels, frames = shape[2:]
        raise ConfigError(
            f"{recipe.model.name} does not work on the {mels} mels x {frames} frames of a clip; change the network, "
            "frontend.mels or frontend.hop"
        ) from None


def student_cost(student: Recipe, limits: Limits, scenes: int) -> Complexity:
    """Return `network_cost` of a student. Raises ConfigError also where it is over the device's limits."""
    cost = network_cost(student, scenes)
    if over := limits.exceeded(cost):
        raise ConfigError(
            f"{student.model.name} is too large for the device ({'; '.join(over)}); choose a smaller one, or raise the "
            "limits"
        )
    return cost


def input_shape(recipe: Recipe, batch: int = 1) -> tuple[int, ...]:
    """Return the shape of the input of the recipe's network: (batch, 1, mels, frames), of a wave (batch, samples)."""
    return (batch, *recipe.frontend.shape(CLIP_SAMPLES))
