"""TF-SepNet-64: the student that won the judges' award of DCASE 2024 task 1 (Cai et al., arXiv 2309.08200, 2408.14862).

The plan of layers is that of the authors' public code (github.com/yqcai888/easy_dcase_task1); the code here is ours.
"""

import torch
from torch import nn

from asc_ray.models.config import TFSepNetConfig
from asc_ray.models.cp_mobile import he_normal
from asc_ray.models.normalization import PER_FREQUENCY, InstanceNorm

# Blocks of each stage, and their output channels as multiples of the width. A pool is in front of all but the first.
STAGES = ((2, 1.0), (2, 1.5), (2, 2.0), (3, 2.5))
LAMBDA = 0.1  # of the residual normalization; the authors fixed it


class FixedResidualNorm(InstanceNorm):
    """Maps x (B, C, F, T) to 0.1 x + IN(x), with the statistics of each frequency bin."""

    def __init__(self) -> None:
        super().__init__(PER_FREQUENCY, eps=1e-5)

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        return LAMBDA * x + super()._normalized(x)


def _conv_bn_relu(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class SeparateConvolutions(nn.Module):
    """Filter one half of the shuffled channels along frequency, the other along time, each averaged over its axis.

    What is left, a line of frames and a line of mel bins, passes a pointwise convolution and is added to every position
    of its half.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.transition = nn.Identity() if inputs == outputs else _conv_bn_relu(inputs, outputs, (1, 1))
        self.shuffle = nn.ChannelShuffle(2)
        self.over_frequency = _conv_bn_relu(half, half, (3, 1), groups=half)
        self.frames = _conv_bn_relu(half, half, (1, 1))
        self.over_time = _conv_bn_relu(half, half, (1, 3), groups=half)
        self.bins = _conv_bn_relu(half, half, (1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shuffle(self.transition(x))
        half = x.shape[1] // 2
        first, second = x[:, :half], x[:, half:]
        first = first + self.frames(self.over_frequency(first).mean(2, keepdim=True))
        second = second + self.bins(self.over_time(second).mean(3, keepdim=True))
        return torch.cat((first, second), dim=1)


class TFSepNet(nn.Module):
    """Maps a log-mel (B, 1, F, T) to logits (B, scenes); its strides and pools need F and T of 32 at least."""

    def __init__(self, config: TFSepNetConfig, scenes: int):
        super().__init__()
        channels = 2 * config.width
        stem = config.width // 2
        layers: list[nn.Module] = [
            _conv_bn_relu(1, stem, (3, 3), stride=2),
            _conv_bn_relu(stem, channels, (3, 3), stride=2, groups=stem),
            FixedResidualNorm(),
        ]
        for number, (blocks, multiple) in enumerate(STAGES):
            if number > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(blocks):
                outputs = int(multiple * config.width)
                layers.append(SeparateConvolutions(channels, outputs))
                channels = outputs
            layers.append(FixedResidualNorm())
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Conv2d(channels, scenes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        he_normal(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
