"""Parameters, multiply-accumulates and bytes of a network, counted by torchinfo as for the paper's Table II."""

import math
from dataclasses import dataclass

import torch
import torchinfo
from torch import nn
from torchinfo.layer_info import LayerInfo

BYTES_EACH = {"float32": 4, "int8": 1}


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True)
class Complexity:
    """`macs` are for the whole input batch. `bytes` are of the parameters alone, as Table II has them."""

    parameters: int
    macs: int
    bytes: dict[str, int]
    layers: list[Layer]


def complexity(model: nn.Module, input_shape: tuple[int, ...] = (1, 1, 256, 64)) -> Complexity:
    """Count an evaluation-mode forward pass of an input of `input_shape`; weights and mode are left as they were.

    Batch norms count as layers (before folding). Functional operations have no parameters and count nothing, so a
    transformer's count lacks the two products inside attention.
    """
    # On the CPU, where the model is, because torchinfo by itself would take any GPU of the machine.
    info = torchinfo.summary(model, input_size=input_shape, verbose=0, mode="eval", device="cpu")
    layers = [
        Layer(
            _path(layer),
            layer.class_name,
            tuple(layer.output_size),
            max(layer.num_params, 0),
            _macs(layer),
        )
        for layer in info.summary_list
        if layer.is_leaf_layer and layer.executed
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(
        parameters=parameters,
        macs=sum(layer.macs for layer in layers),
        bytes={dtype: size * parameters for dtype, size in BYTES_EACH.items()},
        layers=layers,
    )


def peak_activations(model: nn.Module, input_shape: tuple[int, ...] = (1, 1, 256, 64)) -> dict[str, int]:
    """Return, by dtype, the most bytes of activations that are in memory together, for an input of `input_shape`.

    Operations run in the network's order. An activation is kept until its last use: a shortcut's until the sum. Batch
    norms and ReLUs work in place, views take nothing. The model is left in evaluation mode.
    """
    graph = torch.export.export(model.eval(), (torch.zeros(input_shape),)).module().graph
    nodes = [node for node in graph.nodes if node.op in ("call_function", "placeholder")]
    nodes = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    holder: dict[torch.fx.Node, torch.fx.Node] = {}  # a node, and the one whose memory its output lies in
    for node in nodes:
        taken = [source for source in node.all_input_nodes if source in holder]
        in_place = node.target in IN_PLACE and len(taken[0].users) == 1
        viewed = getattr(node.target, "is_view", False)
        holder[node] = holder[taken[0]] if taken and (in_place or viewed) else node
    last = {
        holder[source]: place for place, node in enumerate(nodes) for source in node.all_input_nodes if source in holder
    }
    most = 0
    for place, _ in enumerate(nodes):
        live = {holder[node] for node in nodes[: place + 1] if last.get(holder[node], len(nodes)) >= place}
        most = max(most, sum(node.meta["val"].numel() for node in live))
    return {dtype: size * most for dtype, size in BYTES_EACH.items()}


IN_PLACE = {
    torch.ops.aten.batch_norm.default, torch.ops.aten.relu.default, torch.ops.aten.relu_.default,
    torch.ops.aten.gelu.default, torch.ops.aten.dropout.default,
}  # fmt: skip


def _macs(layer: LayerInfo) -> int:
    # torchinfo counts a Linear once per clip, however many tokens it is applied to.
    tokens = math.prod(layer.output_size[1:-1]) if layer.class_name == "Linear" else 1
    return layer.macs * tokens


def _path(layer: LayerInfo) -> str:
    names: list[str] = []
    node: LayerInfo | None = layer
    while node is not None and node.parent_info is not None:
        names.append(node.var_name)
        node = node.parent_info
    return ".".join(reversed(names))
