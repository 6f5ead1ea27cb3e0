"""The training objective, eq. 5: hard labels and soft targets, by cross-entropy both."""

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from asc_ray.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ScheduledWeight(Section):
    """From `start` in the first epoch to `end` in the last."""

    start: Share = Field(description="in the first epoch")
    end: Share = Field(description="in the last epoch")
    shape: Literal["linear", "cosine"] = Field("linear", description="of the way from one to the other")


class LearnedWeight(Section):
    """Trained with the network, by the same objective, between `low` and `high`."""

    start: Share = Field(description="before the first step")
    low: Share = Field(0.0, description="never below")
    high: Share = Field(1.0, description="never above")

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if not self.low < self.start < self.high:
            raise ValueError(f"low {self.low:g} < start {self.start:g} < high {self.high:g} must hold")
        return self


def _kind(value: Any) -> str:
    """Which of the forms of a weight is meant."""
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

    soft_target: str = Field("fused", description="whose logits are learned from")
    label_weight: LabelWeight = Field(0.17, description="share of the label loss, lambda of eq. 5")
    temperature: float = Field(2.0, gt=0.0, le=100.0, description="that both sides' logits are divided by")


class Objective(nn.Module):
    """Eq. 5 as named losses (`total`, `label`, and `distillation` when there are soft targets), one value a clip.

    Both sides of the distillation loss are divided by the temperature tau, and it is multiplied by tau^2 (Hinton et
    al., 2015), so its gradient keeps its size as tau changes. A learned lambda is low + (high - low) sigmoid(`raw`). It
    weighs the label loss against the divergence from the soft target, and so goes where the student is better: towards
    `high` where labels are learned faster than soft targets are.
    """

    def __init__(self, config: DistillationConfig | None) -> None:
        super().__init__()
        self.config = config
        learned = config.label_weight if config else None
        if isinstance(learned, LearnedWeight):
            share = (learned.start - learned.low) / (learned.high - learned.low)
            self.raw = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    @property
    def scheduled(self) -> bool:
        """Whether the loss depends on `progress`."""
        return self.config is not None and isinstance(self.config.label_weight, ScheduledWeight)

    def label_weight(self, progress: float) -> Tensor | float:
        """lambda at `progress`, 0 in the first epoch and 1 in the last."""
        weight = self.config.label_weight if self.config else 1.0
        if isinstance(weight, LearnedWeight):
            return weight.low + (weight.high - weight.low) * torch.sigmoid(self.raw)
        if isinstance(weight, ScheduledWeight):
            share = progress if weight.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
            return weight.start + (weight.end - weight.start) * share
        return weight

    def mixed(self, soft_targets: Tensor, lam: Tensor, partner: Tensor | None) -> Tensor:
        """Logits (B, K) whose softened probabilities are lam (B, 1) of a clip's own and 1 - lam of its partner's."""
        assert self.config is not None
        own = torch.softmax(soft_targets / self.config.temperature, dim=1)
        return torch.log(torch.lerp(own[partner], own, lam)) * self.config.temperature

    def forward(
        self, logits: Tensor, target: Tensor, soft_targets: Tensor | None, progress: float = 0.0
    ) -> dict[str, Tensor]:
        """logits (B, K) of the student; target (B, K) class probabilities (one-hot, or mixed under mixup); soft_targets
        (B, K) of the teachers, free of temperature. Each loss is (B,)."""
        label = -(target * F.log_softmax(logits, dim=1)).sum(dim=1)
        if soft_targets is None or self.config is None:
            return {"total": label, "label": label}
        tau, weight = self.config.temperature, self.label_weight(progress)
        soft_target = torch.softmax(soft_targets / tau, dim=1)
        distillation = -(soft_target * F.log_softmax(logits / tau, dim=1)).sum(dim=1) * tau**2
        total = weight * label + (1.0 - weight) * distillation
        if isinstance(weight, Tensor):  # no student is below the soft target's own entropy: lambda is not to flee it
            entropy = torch.special.entr(soft_target).sum(dim=1) * tau**2
            total = total + (weight - weight.detach()) * entropy
        return {"total": total, "label": label, "distillation": distillation}
