"""BSConv-CNN: a plain stack of blueprint separable convolutions (Haase and Amthor, 2020, BSConv-U)."""

import torch
from torch import nn

from asc_ray.models.config import BSConvConfig
from asc_ray.models.cp_mobile import conv_bn, he_normal


class BSConv(nn.Sequential):
    """A pointwise convolution across channels, then a depthwise one across the plane: the reverse of MobileNet's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 1, bias=False), *conv_bn(outputs, outputs, 3, groups=outputs), nn.ReLU()
        )


class BSConvCNN(nn.Module):
    """Maps a log-mel (B, 1, F, T) to logits (B, scenes). Its pools need F and T of 32 at least, with five blocks."""

    def __init__(self, config: BSConvConfig, scenes: int):
        super().__init__()
        layers: list[nn.Module] = [*conv_bn(1, config.stem, 3, 2), nn.ReLU()]
        inputs = config.stem
        for index, outputs in enumerate(config.channels):
            layers.append(BSConv(inputs, outputs))
            if index < len(config.channels) - 1:
                layers.append(nn.MaxPool2d(2))
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, scenes))
        he_normal(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
