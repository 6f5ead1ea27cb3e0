"""BSConv-CNN: a plain stack of blueprint separable convolutions (Haase and Amthor, 2020, BSConv-U)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from asc_ray.models.cp_mobile import conv_bn, he_normal
from asc_ray.section import Section


class BSConvConfig(Section):
    """The defaults meet Table III's 73.39 K parameters and 13.18 M MACs; the channels are ours, the paper has none."""

    name: Literal["bsconv_cnn"] = "bsconv_cnn"
    stem: int = Field(16, ge=1, le=256, description="channels of the first convolution")
    channels: tuple[Annotated[int, Field(ge=1, le=2048)], ...] = Field(
        (40, 80, 112, 176, 184), min_length=1, max_length=8, description="output channels of the blocks"
    )


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
