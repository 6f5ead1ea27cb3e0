"""The DCASE 2022 task 1 baseline: three convolutions of 7x7, two pools, two dense layers (READING.md)."""

from typing import Literal

import torch
from torch import nn

from asc_ray.section import Section

MELS, FRAMES = 40, 51


class DCASE22BaselineConfig(Section):
    """It takes only 40 mels x 51 frames: `frontend: {n_fft: 2048, window: 1280, hop: 639, mels: 40}`.

    The 46,512 parameters of the challenge's table are exactly the bytes of its int8 form: 45,816 weights of one byte
    and 174 biases of four, batch norms folded. MACs: 29.23 M. The original's dropout of 0.3 is left out, because every
    random draw of a training here comes from its step's generator.
    """

    name: Literal["dcase22_baseline"] = "dcase22_baseline"


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
