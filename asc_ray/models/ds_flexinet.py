"""DS-FlexiNet (paper, section II-A): depthwise separable residual blocks in stages, with normalization between them."""

from collections import OrderedDict

import torch
from torch import nn

from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.models.cp_mobile import conv_bn, he_normal
from asc_ray.models.normalization import normalization


class Block(nn.Module):
    """Expand, filter depthwise, project, add the shortcut, ReLU.

    The shortcut is the identity where the channels stay and a 1x1 convolution with BN where they change. The ReLU after
    the sum is ResNet's (MobileNetV2 has none): quantization fuses convolution, sum and ReLU, and unsigned activations
    use their whole range. No convolution in it has a stride: a stage is pooled before its first block, which learns
    better (docs/journal.md), and a 1x1 convolution with a stride has a wrong weight gradient in oneDNN 3 for fewer than
    16 channels (github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def __init__(self, inputs: int, outputs: int, expansion: float):
        super().__init__()
        hidden = round(expansion * inputs)
        self.expand = nn.Sequential(*conv_bn(inputs, hidden, 1), nn.ReLU())
        self.depthwise = nn.Sequential(*conv_bn(hidden, hidden, 3, groups=hidden), nn.ReLU())
        self.project = nn.Sequential(*conv_bn(hidden, outputs, 1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*conv_bn(inputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.project(self.depthwise(self.expand(x))) + self.shortcut(x))


class DSFlexiNet(nn.Module):
    """Maps a log-mel (B, 1, F, T) to logits (B, scenes)."""

    def __init__(self, config: DSFlexiNetConfig, scenes: int):
        super().__init__()
        plan = config.channel_plan
        c1, channels = plan.stem
        layers = OrderedDict[str, nn.Module]()

        def normalized(place: str, name: str, channels: int) -> None:
            if place in config.normalization.places:
                layers[f"norm{name}"] = normalization(config.normalization, channels)

        normalized("input", "_input", 1)
        layers["stem"] = nn.Sequential(*conv_bn(1, c1, 3, 2), nn.ReLU(), *conv_bn(c1, channels, 3, 2), nn.ReLU())
        normalized("stem", "_stem", channels)
        for index, stage in enumerate(plan.stages, start=1):
            blocks: list[nn.Module] = [] if stage.pool == (1, 1) else [nn.MaxPool2d(stage.pool)]
            for _ in range(stage.blocks):
                blocks.append(Block(channels, stage.channels, stage.expansion))
                channels = stage.channels
            layers[f"stage{index}"] = nn.Sequential(*blocks)
            normalized("stages" if index < len(plan.stages) else "last", str(index), channels)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, scenes))
        he_normal(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
