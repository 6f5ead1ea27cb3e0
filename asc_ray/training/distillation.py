"""The training objective, eq. 5: hard labels and soft targets, by cross-entropy both."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from asc_ray.section import Section


class DistillationConfig(Section):
    """`soft_target`: `none`, `average`, `fused`, or the name of one teacher system."""

    soft_target: str = "fused"
    label_weight: float = Field(0.02, ge=0.0, le=1.0, description="lambda of eq. 5: the share of the label loss")
    temperature: float = Field(2.0, gt=0.0, le=100.0)


def objective(
    logits: Tensor,
    target: Tensor,
    soft_logits: Tensor | None,
    config: DistillationConfig | None,
) -> dict[str, Tensor]:
    """Named losses (`total`, `label`, and `distillation` when there are soft targets), each (B,): one value a clip.

    logits (B, K) of the student; target (B, K) class probabilities (one-hot, or mixed under mixup);
    soft_logits (B, K) of the teachers, free of temperature. Both sides are divided by the temperature tau and the
    distillation loss is multiplied by tau^2 (Hinton et al., 2015), so its gradient keeps its size as tau changes.
    """
    label = -(target * F.log_softmax(logits, dim=1)).sum(dim=1)
    if soft_logits is None or config is None:
        return {"total": label, "label": label}
    tau = config.temperature
    soft_target = torch.softmax(soft_logits / tau, dim=1)
    distillation = -(soft_target * F.log_softmax(logits / tau, dim=1)).sum(dim=1) * tau**2
    total = config.label_weight * label + (1.0 - config.label_weight) * distillation
    return {"total": total, "label": label, "distillation": distillation}
