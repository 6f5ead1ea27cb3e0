"""Normalization inside DS-FlexiNet: residual normalization and what the paper compares it with."""

import torch
import torch.fx
from torch import nn

from asc_ray.models.config import NormalizationConfig


@torch.fx.wrap  # because a value has no dtype while the graph is traced
def _in_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32: it has no digits left for a difference where the mean is many deviations."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@torch.fx.wrap
def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == other.dtype else x.to(other.dtype)


class InstanceNorm(nn.Module):
    """Eq. 1: x (B, C, F, T) minus its mean, divided by its standard deviation, both over the dimensions `over`.

    It uses mean, mul and rsqrt, because `F.instance_norm` exports as a batch norm. Quantization leaves these operators
    in float; a variance plus eps in 8 bits would be mostly rounding.
    """

    def __init__(self, over: tuple[int, int], eps: float):
        super().__init__()
        self.over, self.eps = over, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _like(self._normalized(_in_float32(x)), x)

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(self.over, keepdim=True)
        variance = (centred * centred).mean(self.over, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps)

    def extra_repr(self) -> str:
        return f"over={self.over}, eps={self.eps}"


class ResidualNorm(InstanceNorm):
    """Eq. 2: lambda * x + IN(x), with one trainable lambda per layer."""

    def __init__(self, over: tuple[int, int], eps: float, lambda_start: float):
        super().__init__(over, eps)
        self.lambda_ = nn.Parameter(torch.tensor(lambda_start))

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        return self.lambda_ * x + super()._normalized(x)


# Dimensions of (B, C, F, T) that the statistics are taken over.
PER_CHANNEL = (2, 3)
PER_FREQUENCY = (1, 3)


def normalization(config: NormalizationConfig, channels: int) -> nn.Module:
    """Build the layer of the configured kind for an input (B, channels, F, T); it keeps the shape."""
    match config.kind:
        case "rn":
            return ResidualNorm(PER_CHANNEL, config.eps, config.lambda_start)
        case "rn_frequency":
            return ResidualNorm(PER_FREQUENCY, config.eps, config.lambda_start)
        case "in":
            return InstanceNorm(PER_CHANNEL, config.eps)
        case "bn":
            return nn.BatchNorm2d(channels, eps=config.eps)
        case "none":
            return nn.Identity()
