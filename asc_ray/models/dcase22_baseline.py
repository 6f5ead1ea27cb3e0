"""The DCASE 2022 task 1 baseline: three convolutions of 7x7, two pools, two dense layers (READING.md)."""

import torch
from torch import nn

from asc_ray.models.config import DCASE22BaselineConfig


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 7, padding=3), nn.BatchNorm2d(outputs), nn.ReLU()]


class DCASE22Baseline(nn.Module):
    """Maps a log-mel (B, 1, 40, 51) to logits (B, scenes)."""

    def __init__(self, config: DCASE22BaselineConfig, scenes: int):
        super().__init__()
        self.features = nn.Sequential(
            *_conv(1, 16), *_conv(16, 16), nn.MaxPool2d(5), *_conv(16, 32), nn.MaxPool2d((4, 10)), nn.Flatten()
        )
        self.classifier = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, scenes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
