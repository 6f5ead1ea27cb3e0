"""What a network costs on a device, and whether it keeps the device's limits."""

from asc_ray.data.clips import CLIP_SAMPLES
from asc_ray.errors import ConfigError
from asc_ray.models.complexity import Complexity, complexity
from asc_ray.models.registry import build
from asc_ray.students.config import Limits
from asc_ray.training.config import Recipe


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
    if over := exceeded(limits, cost):
        raise ConfigError(
            f"{student.model.name} is too large for the device ({'; '.join(over)}); choose a smaller one, or raise the "
            "limits"
        )
    return cost


def exceeded(limits: Limits, cost: Complexity) -> list[str]:
    """Return, in words, which limits a network exceeds; empty if none is."""
    pairs = {"bytes": (cost.bytes["int8"], limits.bytes), "macs": (cost.macs, limits.macs)}
    return [f"limits.{name}: {found:,}, allowed {most:,}" for name, (found, most) in pairs.items() if found > most]


def input_shape(recipe: Recipe, batch: int = 1) -> tuple[int, ...]:
    """Return the shape of the input of the recipe's network: (batch, 1, mels, frames), of a wave (batch, samples)."""
    return (batch, *recipe.frontend.shape(CLIP_SAMPLES))
