"""CP-ResNet: the receptive-field-regularized teacher of CP-JKU's DCASE 2023 system, with its state-dict names."""

from collections import OrderedDict

import torch
from torch import nn

from asc_ray.models.config import CPResNetConfig
from asc_ray.models.cp_mobile import he_normal


class Block(nn.Module):
    """Two convolutions with BN around a shortcut, which is a 1x1 convolution with BN where channels change."""

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, int], groups: int = 1):
        super().__init__()
        k1, k2 = kernels
        self.conv1 = nn.Conv2d(inputs, outputs, k1, padding=k1 // 2, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, k2, padding=k2 // 2, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False))
            self.shortcut.add_module("bn", nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CPResNet(nn.Module):
    """Maps a log-mel (B, 1, F, T) to logits (B, scenes). The pools need F >= 16 and T >= 4."""

    def __init__(self, config: CPResNetConfig, scenes: int):
        super().__init__()
        c1, c2, c3 = config.channels

        def kernel(k: int) -> int:
            return 3 if k <= config.rho else 1

        self.in_c = nn.Sequential(
            nn.Conv2d(1, c1, 5, stride=2, padding=1, bias=False), nn.BatchNorm2d(c1), nn.ReLU(inplace=True)
        )
        self.stage1 = nn.Sequential(
            OrderedDict(
                pool0=nn.MaxPool2d(2),
                block1=Block(c1, c1, (kernel(2), 1)),  # convolution 3 is 1x1 whatever rho is
                pool1=nn.MaxPool2d((2, 1)),
                block2=Block(c1, c1, (kernel(4), kernel(5))),
                pool2=nn.MaxPool2d((2, 1)),
            )
        )
        self.stage2 = nn.Sequential(OrderedDict(block1=Block(c1, c2, (kernel(6), kernel(7)), groups=2)))
        self.stage3 = nn.Sequential(OrderedDict(block1=Block(c2, c3, (kernel(8), kernel(9)))))
        self.feed_forward = nn.Sequential(
            nn.Conv2d(c3, scenes, 1, bias=False), nn.BatchNorm2d(scenes), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw He's weights by fan-out, then apply Fixup: blocks start as their shortcuts, and the head at zero."""
        he_normal(self)
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for block in blocks:
            block.conv1.weight.mul_(len(blocks) ** -0.5)
            block.conv2.weight.zero_()
        head = self.feed_forward[0]
        assert isinstance(head, nn.Conv2d)
        head.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.feed_forward(self.stage3(self.stage2(self.stage1(self.in_c(x)))))
