"""DS-FlexiNet (paper, section II-A): depthwise separable residual blocks in stages, with normalization between them."""

from collections import OrderedDict
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from asc_ray.models.cp_mobile import conv_bn, he_normal
from asc_ray.models.normalization import NormalizationConfig, normalization
from asc_ray.section import Section

Channels = Annotated[int, Field(ge=1, le=2048)]
Step = Annotated[int, Field(ge=1, le=4)]


class Stage(Section):
    """`blocks` blocks of `channels` output channels; the first has the `stride` (frequency, time)."""

    channels: Channels
    blocks: int = Field(ge=1, le=16)
    stride: tuple[Step, Step] = (1, 1)
    expansion: float = Field(2, ge=1, le=8, description="of a block's input channels")


class Plan(Section):
    """Output channels of the two stem convolutions, and the stages."""

    stem: tuple[Channels, Channels]
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=8)


def _plan(stem: tuple[int, int], channels: tuple[int, int, int]) -> Plan:
    """The structure that all four sizes share: an output sees 111 mel bins, and 8 x 8 positions are pooled."""
    shape = ((2, (2, 1)), (2, (2, 2)), (1, (2, 1)))  # blocks and stride of every stage
    stages = (Stage(channels=c, blocks=n, stride=stride) for c, (n, stride) in zip(channels, shape, strict=True))
    return Plan(stem=stem, stages=tuple(stages))


# Found by bench/channel_plans.py, within 0.3 % of Table II's parameters and MACs; the structure was chosen on
# validation clips (docs/journal.md).
PLANS = {
    "sm1": _plan((8, 12), (18, 22, 40)),
    "sm2": _plan((8, 20), (28, 36, 56)),
    "sm3": _plan((8, 32), (34, 52, 76)),
    "sm4": _plan((8, 24), (48, 88, 138)),
}


class DSFlexiNetConfig(Section):
    """A size of Table II, or with `size: null` a plan of one's own."""

    name: Literal["ds_flexinet"] = "ds_flexinet"
    size: Literal["sm1", "sm2", "sm3", "sm4"] | None = "sm2"
    plan: Plan | None = None
    normalization: NormalizationConfig = NormalizationConfig()

    @model_validator(mode="after")
    def _one_plan(self) -> Self:
        if (self.size is None) == (self.plan is None):
            raise ValueError(f"size = {self.size} and a plan exclude each other: give a size, or size: null and a plan")
        return self

    @property
    def channel_plan(self) -> Plan:
        return self.plan or PLANS[self.size or ""]


class Block(nn.Module):
    """Expand, filter depthwise, project, add the shortcut, ReLU.

    The shortcut is the identity where the shape stays and a 1x1 convolution with BN where it changes. The ReLU after
    the sum is ResNet's (MobileNetV2 has none): quantization fuses convolution, sum and ReLU, and unsigned activations
    use their whole range.
    """

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int], expansion: float):
        super().__init__()
        hidden = round(expansion * inputs)
        self.expand = nn.Sequential(*conv_bn(inputs, hidden, 1), nn.ReLU())
        self.depthwise = nn.Sequential(*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU())
        self.project = nn.Sequential(*conv_bn(hidden, outputs, 1))
        self.stride = stride
        same = inputs == outputs and stride == (1, 1)
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # What a 1x1 convolution with a stride would read, but not by one: with channels last and fewer than 16 channels
        # its weight gradient is wrong, or the process dies, in oneDNN 3 (github.com/uxlfoundation/oneDNN/issues/6035).
        kept = x if self.stride == (1, 1) else x[:, :, :: self.stride[0], :: self.stride[1]]
        return torch.relu(self.project(self.depthwise(self.expand(x))) + self.shortcut(kept))


class DSFlexiNet(nn.Module):
    """(B, 1, F, T) log-mel to logits (B, classes)."""

    def __init__(self, config: DSFlexiNetConfig, classes: int):
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
            blocks = []
            for block in range(stage.blocks):
                stride = stage.stride if block == 0 else (1, 1)
                blocks.append(Block(channels, stage.channels, stride, stage.expansion))
                channels = stage.channels
            layers[f"stage{index}"] = nn.Sequential(*blocks)
            normalized("stages" if index < len(plan.stages) else "last", str(index), channels)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
        he_normal(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))
