"""CNN-GRU: the student that came second in DCASE 2025 task 1, without a teacher (Tan et al., arXiv 2509.09931).

The plan of layers is that of the authors' public submission, Tan_SNTLNTU_task1_1; the code here is ours.
"""

import torch
from torch import nn
from torch.nn import functional as F

from asc_ray.models.config import CNNGRUConfig


class SqueezeExcitation(nn.Module):
    """Scales the channels of x (B, C, F, T) by what two dense layers make of their means (Hu et al., 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weigh(x.mean((2, 3)))[:, :, None, None]


class Mix(nn.Module):
    """share * x + (1 - share) * y, with a trainable share."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.share * x + (1 - self.share) * y


def _conv_bn(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> list[nn.Module]:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def _branch() -> nn.Sequential:
    return nn.Sequential(
        *_conv_bn(24, 36, (1, 1)),
        *_conv_bn(36, 72, (5, 1), groups=36),
        *_conv_bn(72, 72, (1, 5), (2, 2), groups=72),
        nn.SiLU(),
        SqueezeExcitation(72),
    )


class CNNGRU(nn.Module):
    """Maps a log-mel (B, 1, 256, T) to logits (B, scenes).

    Two branches, behind a max pool and an average pool, are mixed. The GRU runs over the channels of their time average
    and reads a channel's 16 frequencies in each step.
    """

    def __init__(self, config: CNNGRUConfig, scenes: int):
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn(1, 7, (3, 3)),
            *_conv_bn(7, 12, (1, 1)),
            nn.ChannelShuffle(6),
            *_conv_bn(12, 24, (3, 1), groups=12),
            *_conv_bn(24, 24, (1, 3), groups=12),
            nn.SiLU(),
            SqueezeExcitation(24),
        )
        self.peaks, self.means = _branch(), _branch()
        self.mixed_peaks, self.mixed_means, self.mixed, self.mixed_state = Mix(), Mix(), Mix(), Mix()
        self.pointwise = nn.Sequential(*_conv_bn(72, 72, (1, 1)))
        self.reduce = nn.Sequential(
            nn.ChannelShuffle(36),
            *_conv_bn(72, 144, (5, 1), (2, 1), groups=72),
            nn.SiLU(),
            *_conv_bn(144, 28, (5, 1)),
            nn.SiLU(),
        )
        self.gru = nn.GRU(config.mels // 16, 64, batch_first=True)
        self.classifier = nn.Linear(28, scenes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        peaks, means = self.peaks(F.max_pool2d(x, 2)), self.means(F.avg_pool2d(x, 2))
        mixed_means = self.mixed_means(F.avg_pool2d(means, 2), F.avg_pool2d(peaks, 2))
        mixed_peaks = self.mixed_peaks(F.max_pool2d(peaks, 2), F.max_pool2d(means, 2))
        x = self.mixed(mixed_means, mixed_peaks)
        x = self.reduce(self.pointwise(x) + x).mean(3)  # (B, 28, 16)
        states = self.gru(x)[0]  # (B, 28, 64)
        return self.classifier(F.silu(self.mixed_state(x.mean(2), states.mean(2))))
