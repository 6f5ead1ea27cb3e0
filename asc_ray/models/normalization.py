"""Normalization inside DS-FlexiNet: residual normalization and what the paper compares it with."""

from typing import Annotated, Literal

import torch
import torch.fx
from pydantic import Field
from torch import nn

from asc_ray.section import Section


class NormalizationConfig(Section):
    """Which normalization there is, and where.

    `rn`: eq. 2 with the statistics of eq. 1. `rn_frequency`: the same by frequency bin. `in`: eq. 1. `bn`: batch norm.

    `places`: of the log-mel, behind the two stem convolutions, between the stages (the paper's), behind the last one.
    """

    kind: Literal["rn", "rn_frequency", "in", "bn", "none"] = Field("rn", description="what is computed")
    lambda_start: float = Field(0.5, ge=0, le=10, description="lambda of eq. 2 before the training")
    eps: float = Field(1e-5, gt=0, le=1, description="added to the variance")
    places: Annotated[tuple[Literal["input", "stem", "stages", "last"], ...], Field(min_length=1)] = Field(
        ("stages",), description="where it is"
    )


@torch.fx.wrap  # in a traced graph nothing has a type
def _in_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision has no digits left for a difference where the mean is many deviations."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@torch.fx.wrap
def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == other.dtype else x.to(other.dtype)


class InstanceNorm(nn.Module):
    """Eq. 1: x (B, C, F, T) minus its mean, over its standard deviation, both taken over `over`.

    Written as mean, mul and rsqrt and not as `F.instance_norm`, which exports as a batch norm: quantization leaves
    these operators in float, and a variance plus eps in 8 bits would be mostly rounding.
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
    """Eq. 2: lambda * x + IN(x), one trainable lambda a layer."""

    def __init__(self, over: tuple[int, int], eps: float, lambda_start: float):
        super().__init__(over, eps)
        self.lambda_ = nn.Parameter(torch.tensor(lambda_start))

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        return self.lambda_ * x + super()._normalized(x)


# Dimensions of (B, C, F, T) that the statistics are taken over.
PER_CHANNEL = (2, 3)
PER_FREQUENCY = (1, 3)


def normalization(config: NormalizationConfig, channels: int) -> nn.Module:
    """The layer of the configured kind for an input of (B, channels, F, T); the shape is kept."""
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
