"""The training objective, eq. 5: cross-entropy with hard labels and with soft targets."""

import math
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from asc_ray.section import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]


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


class Objective(nn.Module):
    """Eq. 5 as named losses (`total`, `label`, and `distillation` when there are soft targets), one value a clip.

    In the distillation loss both sides' logits are divided by the temperature tau. The loss is multiplied by tau^2
    (Hinton et al., 2015), so its gradient keeps its size as tau changes. A learned lambda is
    low + (high - low) sigmoid(`raw`). It moves towards the smaller of the label loss and the divergence from the soft
    target: towards `high` where labels are learned faster than soft targets.
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
        """Return lambda at `progress`, 0 in the first epoch and 1 in the last."""
        weight = self.config.label_weight if self.config else 1.0
        if isinstance(weight, LearnedWeight):
            return weight.low + (weight.high - weight.low) * torch.sigmoid(self.raw)
        if isinstance(weight, ScheduledWeight):
            share = progress if weight.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
            return weight.start + (weight.end - weight.start) * share
        return weight

    def mixed(self, soft_targets: Tensor, lam: Tensor, partner: Tensor | None) -> Tensor:
        """Return logits (B, K) whose softened probabilities mix a clip's own, by lam (B, 1), with its partner's."""
        assert self.config is not None
        own = torch.softmax(soft_targets / self.config.temperature, dim=1)
        return torch.log(torch.lerp(own[partner], own, lam)) * self.config.temperature

    def forward(
        self, logits: Tensor, target: Tensor, soft_targets: Tensor | None, progress: float = 0.0
    ) -> dict[str, Tensor]:
        """Return the losses, each (B,), of the student's `logits` (B, K).

        `target` (B, K) has the scenes' probabilities (one-hot, or mixed by mixup). `soft_targets` (B, K) are the
        teachers' logits, not divided by the temperature.
        """
        label = -(target * F.log_softmax(logits, dim=1)).sum(dim=1)
        if soft_targets is None or self.config is None:
            return {"total": label, "label": label}
        tau, weight = self.config.temperature, self.label_weight(progress)
        soft_target = torch.softmax(soft_targets / tau, dim=1)
        distillation = -(soft_target * F.log_softmax(logits / tau, dim=1)).sum(dim=1) * tau**2
        total = weight * label + (1.0 - weight) * distillation
        # The distillation loss cannot fall below the soft target's entropy, so that part must not move lambda.
        if isinstance(weight, Tensor):
            entropy = torch.special.entr(soft_target).sum(dim=1) * tau**2
            total = total + (weight - weight.detach()) * entropy
        return {"total": total, "label": label, "distillation": distillation}
