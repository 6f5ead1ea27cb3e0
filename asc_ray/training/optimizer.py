"""The optimizer, its learning-rate schedule, and the mean over the last epochs' weights."""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from asc_ray.section import Section
from asc_ray.training.objective import Objective


class ScheduleConfig(Section):
    """Exponential warm-up, plateau, linear ramp-down to `last_factor`; all lengths in epochs."""

    warm_up: int = Field(3, ge=0, description="epochs of the warm-up")
    ramp_down_start: int = Field(15, ge=0, description="epochs before the rate begins to fall")
    ramp_down_length: int = Field(12, ge=1, description="epochs over which it falls")
    last_factor: float = Field(0.005, ge=0.0, le=1.0, description="share of the rate after the ramp-down")


def learning_rate_factor(epoch: int, schedule: ScheduleConfig) -> float:
    """Return the factor of the learning rate in the zero-based `epoch`.

    It is the warm-up exp(-5 (1 - t)^2) with t = max(epoch, 1/2) / warm_up (Laine and Aila, 2017), times a line from 1
    at `ramp_down_start` to `last_factor` after `ramp_down_length` epochs: the schedule of CP-JKU's DCASE23 recipes.
    """
    factor = 1.0
    if epoch < schedule.warm_up:
        factor = math.exp(-5.0 * (1.0 - max(epoch, 0.5) / schedule.warm_up) ** 2)
    progress = min(max(epoch - schedule.ramp_down_start, 0) / schedule.ramp_down_length, 1.0)
    return factor * (1.0 + (schedule.last_factor - 1.0) * progress)


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


def optimizer_of(
    model: nn.Module, objective: Objective, settings: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if own := list(objective.parameters()):  # decay would draw a learned lambda to the middle of its bounds
        groups.append({"params": own, "weight_decay": 0.0})
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    gpu = device.type != "cpu"
    rate = torch.tensor(settings.learning_rate, device=device) if gpu else settings.learning_rate
    return kind(groups, lr=rate, weight_decay=settings.weight_decay, fused=gpu, capturable=gpu)


@torch.no_grad()
def average_weights(trained: nn.ModuleDict, settings: OptimizerConfig, epoch: int) -> None:
    """Add the network's weights and batch-norm statistics to their mean over the last epochs.

    After the last epoch the network takes this mean.
    """
    number = epoch + 1 - (settings.epochs - settings.average_epochs)
    if settings.average_epochs == 1 or number < 1:
        return
    mean, network = trained["average"].state_dict(), trained["network"].state_dict()
    for own, value in zip(mean.values(), network.values(), strict=True):
        if number == 1 or not own.is_floating_point():
            own.copy_(value)
        else:
            own.lerp_(value, 1 / number)
    if epoch + 1 == settings.epochs:
        trained["network"].load_state_dict(mean)
