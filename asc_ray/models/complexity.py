"""Parameters, multiply-accumulates and bytes of a network, counted by torchinfo as for the paper's Table II."""

import math
from dataclasses import dataclass

import torchinfo
from pydantic import Field
from torch import nn
from torchinfo.layer_info import LayerInfo

from asc_ray.section import Section

BYTES_EACH = {"float32": 4, "int8": 1}


class Limits(Section):
    """What a device has for a student; DCASE's are the defaults."""

    bytes: int = Field(128_000, ge=1, description="of the parameters as int8")
    macs: int = Field(30_000_000, ge=1, description="multiply-accumulates of a clip")

    def exceeded(self, cost: "Complexity") -> list[str]:
        """In words, what is over; empty where all is within."""
        found = {"bytes": cost.bytes["int8"], "macs": cost.macs}
        return [
            f"limits.{name}: {found[name]:,}, allowed {limit:,}"
            for name, limit in (("bytes", self.bytes), ("macs", self.macs))
            if found[name] > limit
        ]


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    activations: int  # elements of its input and its output, which are in memory together


@dataclass(frozen=True)
class Complexity:
    """`macs` are for the whole input batch. `bytes` are of the parameters alone, as Table II has them.

    `peak_activations`: bytes of the largest input and output of one layer, without what a shortcut keeps meanwhile.
    """

    parameters: int
    macs: int
    bytes: dict[str, int]
    peak_activations: dict[str, int]
    layers: list[Layer]


def complexity(model: nn.Module, input_shape: tuple[int, ...] = (1, 1, 256, 64)) -> Complexity:
    """Counts an evaluation-mode forward pass of an input of `input_shape`; weights and mode are left as they were.

    Batch norms count as layers (before folding). Functional operations have no parameters and count nothing: of a
    transformer, the two products inside attention are missing.
    """
    info = torchinfo.summary(model, input_size=input_shape, verbose=0, mode="eval")
    layers = [
        Layer(
            _path(layer),
            layer.class_name,
            tuple(layer.output_size),
            max(layer.num_params, 0),
            _macs(layer),
            math.prod(layer.input_size) + math.prod(layer.output_size),
        )
        for layer in info.summary_list
        if layer.is_leaf_layer and layer.executed
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(
        parameters=parameters,
        macs=sum(layer.macs for layer in layers),
        bytes={dtype: size * parameters for dtype, size in BYTES_EACH.items()},
        peak_activations={
            dtype: size * max((layer.activations for layer in layers), default=0) for dtype, size in BYTES_EACH.items()
        },
        layers=layers,
    )


def _macs(layer: LayerInfo) -> int:
    # torchinfo counts a Linear once a clip, however many tokens it is applied to.
    tokens = math.prod(layer.output_size[1:-1]) if layer.class_name == "Linear" else 1
    return layer.macs * tokens


def _path(layer: LayerInfo) -> str:
    names: list[str] = []
    node: LayerInfo | None = layer
    while node is not None and node.parent_info is not None:
        names.append(node.var_name)
        node = node.parent_info
    return ".".join(reversed(names))
