"""Learning-rate schedules of the published recipes, as factors of the base rate per epoch."""

import math

from pydantic import Field

from asc_ray.section import Section


class ScheduleConfig(Section):
    """Exponential warm-up, plateau, linear ramp-down to `last_factor`; all lengths in epochs."""

    warm_up: int = Field(3, ge=0, description="epochs of the warm-up")
    ramp_down_start: int = Field(15, ge=0, description="epochs before the rate begins to fall")
    ramp_down_length: int = Field(12, ge=1, description="epochs that it falls for")
    last_factor: float = Field(0.005, ge=0.0, le=1.0, description="share of the rate that is left then")


def learning_rate_factor(epoch: int, schedule: ScheduleConfig) -> float:
    """Factor for the zero-based `epoch`.

    Warm-up exp(-5 (1 - t)^2) with t = max(epoch, 1/2) / warm_up (Laine and Aila, 2017), times a line from 1 at
    `ramp_down_start` to `last_factor` after `ramp_down_length` epochs: the schedule of CP-JKU's DCASE23 recipes.
    """
    factor = 1.0
    if epoch < schedule.warm_up:
        factor = math.exp(-5.0 * (1.0 - max(epoch, 0.5) / schedule.warm_up) ** 2)
    progress = min(max(epoch - schedule.ramp_down_start, 0) / schedule.ramp_down_length, 1.0)
    return factor * (1.0 + (schedule.last_factor - 1.0) * progress)
