"""CP-Mobile: the 127 K student that won DCASE 2023 task 1 (CP-JKU), with its state-dict names."""

from collections import OrderedDict

import torch
from torch import nn

from asc_ray.models.config import CPMobileConfig

BLOCKS = (3, 2, 1)
STRIDES = {"b2": (2, 2), "b4": (2, 1)}  # (frequency, time); every other block keeps the resolution


class GlobalResponseNorm(nn.Module):
    """x + gamma * x * g / mean(g) + beta, g (B, C, 1, 1) the L2 norm of each channel; scalar gamma and beta."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = response / (response.mean(1, keepdim=True) + 1e-6)
        return x + self.gamma * (x * relative) + self.beta


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int | tuple[int, int] = 1, groups: int = 1
) -> list[nn.Module]:
    # The padding is a number: "same" would keep quantization from folding the batch norm.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def he_normal(network: nn.Module) -> None:
    """Draw the weights of the network's convolutions with the variance of He et al., 2015, by fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Block(nn.Module):
    """Expand, filter depthwise, project; a shortcut (pooled with a stride) where channels are equal; GRN; ReLU."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: tuple[int, int]):
        super().__init__()
        hidden = expansion * inputs
        self.after_block_norm = GlobalResponseNorm()
        self.block = nn.Sequential(
            nn.Sequential(*conv_bn(inputs, hidden, 1), nn.ReLU(inplace=True)),
            nn.Sequential(*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU(inplace=True)),
            nn.Sequential(*conv_bn(hidden, outputs, 1)),
        )
        self.shortcut: nn.Module | None = None
        if inputs == outputs:
            self.shortcut = nn.Identity() if stride == (1, 1) else nn.AvgPool2d(3, stride, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return torch.relu(self.after_block_norm(y))


class CPMobile(nn.Module):
    """Maps a log-mel (B, 1, F, T) to logits (B, scenes)."""

    def __init__(self, config: CPMobileConfig, scenes: int):
        super().__init__()
        self.in_c = nn.Sequential(
            nn.Sequential(*conv_bn(1, config.width // 4, 3, 2), nn.ReLU(inplace=True)),
            nn.Sequential(*conv_bn(config.width // 4, config.width, 3, 2), nn.ReLU(inplace=True)),
        )
        self.stages = nn.Sequential()
        inputs, number = config.width, 0
        for index, (outputs, blocks) in enumerate(zip(config.channels, BLOCKS, strict=True), start=1):
            stage = OrderedDict[str, nn.Module]()
            for _ in range(blocks):
                number += 1
                stage[f"b{number}"] = Block(inputs, outputs, config.expansion, STRIDES.get(f"b{number}", (1, 1)))
                inputs = outputs
            self.stages.add_module(f"s{index}", nn.Sequential(stage))
        self.feed_forward = nn.Sequential(*conv_bn(inputs, scenes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        he_normal(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(self.stages(self.in_c(x)))
