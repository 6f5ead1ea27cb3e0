"""The training objective, eq. 5: cross-entropy with hard labels and with soft targets."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asc_ray.training.config import DistillationConfig, LearnedWeight, ScheduledWeight


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
