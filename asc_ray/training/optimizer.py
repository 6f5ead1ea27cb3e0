"""The optimizer, its learning-rate schedule, and the mean over the last epochs' weights."""

import math
from typing import Any

import torch
from torch import nn

from asc_ray.training.config import OptimizerConfig, ScheduleConfig
from asc_ray.training.objective import Objective


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
