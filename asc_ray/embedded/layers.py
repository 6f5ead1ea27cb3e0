"""The layers of an int8 network, as the C form computes them: 8-bit values in, 8-bit values out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Unknown(ValueError):
    """The network has something that the C form does not compute; the message names the operator."""


@dataclass(frozen=True)
class Grid:
    """An 8-bit value: name, shape, and what a step means, x = (q - zero) * step."""

    name: str
    channels: int
    height: int
    width: int
    step: np.float32
    zero: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def bytes(self) -> int:
        return self.channels * self.positions


@dataclass(frozen=True)
class Convolution:
    """`weights` (O, I, KH, KW) int8, `bias` (O) in steps of input times weight, `multiplier` (O) to steps of y.

    `depthwise`: I is 1, and output o comes from channel o. `low`: the least output.
    """

    x: Grid
    y: Grid
    weights: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray
    strides: Sequence[int]
    pads: Sequence[int]
    depthwise: bool
    low: int

    @property
    def pointwise(self) -> bool:
        return self.weights.shape[2:] == (1, 1) and tuple(self.strides) == (1, 1)


@dataclass(frozen=True)
class Sum:
    a: Grid
    b: Grid
    y: Grid
    low: int


@dataclass(frozen=True)
class MaxPool:
    x: Grid
    y: Grid
    window: tuple[int, int]


@dataclass(frozen=True)
class ResidualNorm:
    """residual * x + gain * IN(inner * x), a ReLU where low is the zero point, and a maximum over `window`."""

    x: Grid
    y: Grid
    residual: np.float32
    inner: np.float32
    gain: np.float32
    eps: np.float32
    window: tuple[int, int]
    low: int


@dataclass(frozen=True)
class ResponseNorm:
    """x + gamma * x * g / (mean(g) + eps) + beta, as `ResidualNorm`."""

    x: Grid
    y: Grid
    gamma: np.float32
    beta: np.float32
    eps: np.float32
    window: tuple[int, int]
    low: int


@dataclass(frozen=True)
class Mean:
    x: Grid
    y: Grid


@dataclass(frozen=True)
class Linear:
    """The last layer: `weights` (O, I) int8, `bias` and `multiplier` to float logits (O)."""

    x: Grid
    weights: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray


@dataclass(frozen=True)
class MeanLogits:
    """The last layer: each channel's mean is a logit."""

    x: Grid


Layer = Convolution | Sum | MaxPool | ResidualNorm | ResponseNorm | Mean | Linear | MeanLogits


@dataclass(frozen=True)
class Network:
    """`input` is the rounded log-mel, of one channel; `layers` in the order in which they are computed."""

    input: Grid
    layers: Sequence[Layer]
    outputs: int


def taken(layer: Layer) -> tuple[Grid, ...]:
    """Return the values that the layer reads."""
    return (layer.a, layer.b) if isinstance(layer, Sum) else (layer.x,)


def made(layer: Layer) -> Grid | None:
    """Return the 8-bit value that the layer makes; None for the logits."""
    return None if isinstance(layer, Linear | MeanLogits) else layer.y
