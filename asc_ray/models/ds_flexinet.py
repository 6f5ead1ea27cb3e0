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
    """A max pool of `pool` (frequency, time) positions, then `blocks` blocks of `channels` output channels."""

    channels: Channels = Field(description="output channels of its blocks")
    blocks: int = Field(ge=1, le=16, description="number of blocks")
    pool: tuple[Step, Step] = Field((1, 1), description="size of the max pool, in mel bins and frames")
    expansion: float = Field(2, ge=1, le=8, description="hidden channels of a block per input channel")


class ChannelPlan(Section):
    """Output channels of the two stem convolutions, and the stages."""

    stem: tuple[Channels, Channels] = Field(description="output channels of the first two convolutions")
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=8, description="the stages, in their order")


def _plan(stem: tuple[int, int], channels: tuple[int, int, int]) -> ChannelPlan:
    """Return the structure that all four sizes share: one block a stage, on 64 x 16, 32 x 8 and 16 x 4 positions."""
    pools = ((1, 1), (2, 2), (2, 2))
    stages = (Stage(channels=c, blocks=1, pool=pool) for c, pool in zip(channels, pools, strict=True))
    return ChannelPlan(stem=stem, stages=tuple(stages))


# Found by bench/channel_plans.py, within 0.3 % of Table II's parameters and 0.5 % of its MACs. The structure was chosen
# on corpora whose recordings and devices are not those that results are reported on (docs/journal.md).
PLANS = {
    "sm1": _plan((8, 16), (16, 32, 50)),
    "sm2": _plan((8, 20), (36, 48, 68)),
    "sm3": _plan((8, 32), (40, 68, 100)),
    "sm4": _plan((8, 32), (56, 112, 172)),
}


class DSFlexiNetConfig(Section):
    """A size of Table II, or with `size: null` a plan of one's own."""

    name: Literal["ds_flexinet"] = "ds_flexinet"
    size: Literal["sm1", "sm2", "sm3", "sm4"] | None = Field("sm2", description="a size of Table II")
    plan: ChannelPlan | None = Field(None, description="channels and stages in place of a size")
    normalization: NormalizationConfig = NormalizationConfig()

    @model_validator(mode="after")
    def _one_plan(self) -> Self:
        if (self.size is None) == (self.plan is None):
            raise ValueError(f"size = {self.size} and a plan exclude each other: give a size, or size: null and a plan")
        return self

    @property
    def channel_plan(self) -> ChannelPlan:
        return self.plan or PLANS[self.size or ""]


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
