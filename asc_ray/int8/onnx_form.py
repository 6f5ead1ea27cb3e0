"""A converted model as ONNX (QuantizeLinear, DequantizeLinear), in a form for which engines have 8-bit kernels.

torch's own translation is rewritten here. The result computes the same values, except that some sums in float have
another order.

* Instance normalization is one operator, a mean over the plane is a global pool, and biases are int32 on the grid of
  their products, to which `round_biases` rounded them.
* The two 3x3 convolutions of stride 2 that begin a network become one of 5x5 with stride 4, for blocks of 2 x 2
  positions at once, and one of 2x2 over these blocks. onnxruntime then takes a third of the time, because with one
  input channel and eight output channels its 8-bit kernel fills no register. The added weights are zeros: some 10 to
  20 % more multiply-accumulates.
* Depthwise convolutions get channels of zeros up to a multiple of 16. The kernel takes 16 at once and the rest one by
  one, so 40 channels take twice the time of 64.
* The maximum of rounded values is the rounded maximum. So behind a normalization the pool comes before the rounding, in
  float, because onnxruntime's pool of 8-bit values takes seven times as long. Its average pool does too, and is written
  as a depthwise convolution with equal weights.
* lambda x + IN(x) becomes z + IN(z) with z = lambda x and eps times lambda^2: the 8-bit x is read once and not twice.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from asc_ray.files import write_atomically
from asc_ray.int8.preparation import FREE_BATCH, example_of, quiet

PLANE = [2, 3]  # frequency and time of (B, C, F, T)
LANES = 16  # channels that a depthwise kernel takes at once
LEAST_LAMBDA = 0.01  # below this, eps lambda^2 would be lost beside a variance


def export_onnx(model: nn.Module, file: Path) -> None:
    """Write a converted model, or an exported float model, as ONNX with the input `mel` and the output `logits`."""
    with quiet():
        program = torch.onnx.export(
            model, (example_of(model),), dynamo=True, verbose=False, dynamic_shapes=FREE_BATCH,
            input_names=["mel"], output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    graph = program.model.graph
    _join_instance_norms(graph)
    _pool_where_averaged(graph)
    _pool_before_rounding(graph)
    _convolve_where_pooled(graph)
    _block_the_stem(graph)
    _pad_depthwise(graph)
    _biases_as_integers(graph)
    # The metadata say where in PyTorch each node comes from, and are nine tenths of the file.
    for clean in (passes.RemoveUnusedNodesPass(), passes.ClearMetadataAndDocStringPass()):
        clean(program.model)
    proto = program.model_proto
    proto.graph.ClearField("value_info")  # it describes values that are gone
    write_atomically(file, proto.SerializeToString())


class OnnxModel(nn.Module):
    """An ONNX file of `export_onnx`, run by onnxruntime, whose integer kernels compute what torch only emulates."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def forward(self, mel: Tensor) -> Tensor:
        (logits,) = self._session.run(["logits"], {"mel": mel.contiguous().numpy()})
        return torch.from_numpy(logits)


def _nodes(graph: ir.Graph, kind: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == kind]


def _above(value: ir.Value | None, kinds: tuple[str, ...]) -> Iterator[ir.Node]:
    """Yield the nodes that the value comes through, upwards, as long as they are of these kinds."""
    while value is not None and (node := value.producer()) is not None and node.op_type in kinds:
        yield node
        value = node.inputs[0]


_NONE = ir.node("None", [])


def _maker(value: ir.Value | None) -> ir.Node:
    """Return the node that computes the value, or `_NONE` for a weight or an input."""
    return (value and value.producer()) or _NONE


def _constant(value: ir.Value | None) -> np.ndarray:
    """Return the value of a weight or of a number in the graph; an empty array for a value that is computed."""
    return np.zeros(0) if value is None or value.const_value is None else value.const_value.numpy()


def _added(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _set(node: ir.Node, **attributes: int | list[int]) -> None:
    for name, value in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrInt64s(name, value)


def _get(node: ir.Node, name: str) -> Any:
    """Return the node's attribute, a whole number or a list of them."""
    value = node.attributes[name].value
    return list(value) if isinstance(value, list | tuple) else value


def _replace(old: ir.Node, kind: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Node:
    """Add a node whose output replaces the old one's wherever that was used, and return it."""
    new = ir.node(kind, inputs, attributes)
    old.append(new)
    old.outputs[0].replace_all_uses_with(new.outputs[0])
    for name in ("name", "shape", "type"):
        setattr(new.outputs[0], name, getattr(old.outputs[0], name))
    old.outputs[0].name = f"{new.outputs[0].name}_before"
    return new


def _mean_over_the_plane(value: ir.Value | None) -> ir.Value | None:
    """Return x where the value is the mean of x over frequency and time, otherwise None."""
    node = _maker(value)
    averaged = node.op_type == "ReduceMean" and sorted(np.ravel(_constant(node.inputs[1])) % 4) == PLANE
    return node.inputs[0] if averaged else None


def _join_instance_norms(graph: ir.Graph) -> None:
    """Replace (x - mean) * 1 / sqrt(mean((x - mean)^2) + eps) by one operator."""
    for scale in _nodes(graph, "Reciprocal"):
        above = list(_above(scale.outputs[0], ("Reciprocal", "Sqrt", "Add")))
        if len(above) != 3:
            continue
        eps, square = _constant(above[2].inputs[1]), _maker(_mean_over_the_plane(above[2].inputs[0]))
        difference = _maker(square.inputs[0]) if square.op_type == "Mul" else _NONE
        if not eps.size or difference.op_type != "Sub":
            continue
        x, (product,) = difference.inputs[0], scale.outputs[0].consumers()
        if _mean_over_the_plane(difference.inputs[1]) is not x or difference.outputs[0] not in product.inputs:
            continue
        assert x is not None
        assert x.shape is not None
        channels, name = x.shape[1], product.outputs[0].name
        assert isinstance(channels, int)
        factor = 1.0
        for scaled in [node for node in x.consumers() if node.op_type == "Mul"]:
            lambda_ = next((_constant(value) for value in scaled.inputs if value is not x), np.zeros(0))
            if lambda_.size == 1 and abs(lambda_) > LEAST_LAMBDA:
                x, factor = scaled.outputs[0], float(lambda_)
                break
        sign = _added(graph, f"{name}_scale", np.full(channels, np.sign(factor), np.float32))
        zeros = _added(graph, f"{name}_shift", np.zeros(channels, np.float32))
        _replace(product, "InstanceNormalization", [x, sign, zeros], epsilon=float(eps) * factor**2)


def _pool_where_averaged(graph: ir.Graph) -> None:
    for node in _nodes(graph, "ReduceMean"):
        if (x := _mean_over_the_plane(node.outputs[0])) is None:
            continue
        pool = _replace(node, "GlobalAveragePool", [x])
        reshape, *others = pool.outputs[0].consumers()
        quantize = next(iter(reshape.outputs[0].consumers()), _NONE)
        if reshape.op_type == "Reshape" and quantize.op_type == "QuantizeLinear" and not others:
            # With a quantization before the reshape, and not only behind it, the pool is between 8-bit values.
            value = pool.outputs[0]
            for kind in ("QuantizeLinear", "DequantizeLinear"):
                added = ir.node(kind, [value, *quantize.inputs[1:]], quantize.attributes)
                added.outputs[0].name = f"{pool.outputs[0].name}_{kind}"
                reshape.prepend(added)
                value = added.outputs[0]
            reshape.replace_input_with(0, value)


def _pool_before_rounding(graph: ir.Graph) -> None:
    for pool in _nodes(graph, "MaxPool"):
        above = list(_above(pool.inputs[0], ("DequantizeLinear", "QuantizeLinear")))
        if [node.op_type for node in above] != ["DequantizeLinear", "QuantizeLinear"]:
            continue
        made = _maker(above[1].inputs[0])
        if made.op_type == "Relu" or all(_maker(x).op_type == "DequantizeLinear" for x in made.inputs[:2]):
            continue  # an 8-bit kernel computes the rounded value
        pool.replace_input_with(0, above[1].inputs[0])
        # onnxruntime would move the rounding above the pool again, but not past this bound.
        name = pool.outputs[0].name
        least = _added(graph, f"{name}_least", np.array(np.finfo(np.float32).min, np.float32))
        bounded = ir.node("Max", [pool.outputs[0], least])
        bounded.outputs[0].name = f"{name}_bounded"
        pool.append(bounded)
        pool.outputs[0].replace_all_uses_with(bounded.outputs[0])
        bounded.replace_input_with(0, pool.outputs[0])


def _convolve_where_pooled(graph: ir.Graph) -> None:
    """Write average pools of 8-bit values as convolutions, where padding counts as zeros in the average."""
    for pool in _nodes(graph, "AveragePool"):
        x, maker = pool.inputs[0], _maker(pool.inputs[0])
        if maker.op_type != "DequantizeLinear" or not _get(pool, "count_include_pad") or _get(pool, "ceil_mode"):
            continue
        assert x is not None
        assert x.shape is not None
        channels, kernel, name = int(x.shape[1]), _get(pool, "kernel_shape"), pool.outputs[0].name  # type: ignore[arg-type]
        arrays = {
            "weights": np.ones((channels, 1, *kernel), np.int8),
            "scale": np.full(channels, 1 / np.prod(kernel), np.float32),
            "zero": np.zeros(channels, np.int8),
        }
        inputs = [_added(graph, f"{name}_{part}", array) for part, array in arrays.items()]
        weights = ir.node("DequantizeLinear", inputs, {"axis": 0})
        weights.outputs[0].name = f"{name}_kernel"
        pool.prepend(weights)
        places = {key: _get(pool, key) for key in ("kernel_shape", "strides", "pads")}
        _replace(pool, "Conv", [x, weights.outputs[0]], group=channels, **places)


def _alone_between(first: ir.Node, second: ir.Node) -> list[ir.Node]:
    """Return the nodes between two convolutions; none where another node uses the first one's output or theirs."""
    between = list(_above(second.inputs[0], ("Relu", "QuantizeLinear", "DequantizeLinear")))
    alone = all(len(value.uses()) == 1 for value in (first.outputs[0], *(node.outputs[0] for node in between)))
    return between if between and alone and between[-1].inputs[0] is first.outputs[0] else []


def _pad(graph: ir.Graph, node: ir.Node, index: int, more: int, axis: int = 0, value: int = 0) -> None:
    """Append `more` entries of `value` to the node's input `index` along the axis."""
    array = _constant(node.inputs[index])
    widths = [(0, more if dimension == axis else 0) for dimension in range(array.ndim)]
    padded = np.pad(array, widths, constant_values=value)
    node.replace_input_with(index, _added(graph, f"{node.outputs[0].name}_padded_{index}", padded))


def _pad_depthwise(graph: ir.Graph) -> None:
    convs = _nodes(graph, "Conv")
    for first, depthwise, last in zip(convs, convs[1:], convs[2:], strict=False):
        channels = _get(depthwise, "group")
        more = -channels % LANES
        stored = [_maker(conv.inputs[1]) for conv in (first, depthwise, last)]
        between = [_alone_between(first, depthwise), _alone_between(depthwise, last)]
        if (
            channels == 1
            or not more
            or not all(between)
            or any(node.op_type != "DequantizeLinear" for node in stored)
            or len(_constant(stored[0].inputs[0])) != channels
            or any(_get(conv, "group") != 1 for conv in (first, last))
        ):
            continue
        for conv, node in zip((first, depthwise), stored, strict=False):
            for index, fill in enumerate((0, 1, 0)):  # weights; scales, which must not be 0; zero points
                _pad(graph, node, index, more, value=fill)
            if len(conv.inputs) > 2:
                _pad(graph, conv, 2, more)
        _pad(graph, stored[2], 0, more, axis=1)
        _set(depthwise, group=channels + more)
        for value in (first.outputs[0], depthwise.outputs[0], *(node.outputs[0] for path in between for node in path)):
            value.shape = None


def _block_the_stem(graph: ir.Graph) -> None:
    convs = _nodes(graph, "Conv")
    if len(convs) < 2:
        return
    first, second = convs[:2]
    between = _alone_between(first, second)
    shape = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    if not (
        between
        and all(_get(conv, name) == value for conv in (first, second) for name, value in shape.items())
        and all(_get(conv, "group") == 1 for conv in (first, second))
        and not any(int(size) % 4 for size in list(first.inputs[0].shape)[2:])  # type: ignore[union-attr, arg-type]
    ):
        return
    stored = [_maker(conv.inputs[1]) for conv in (first, second)]
    if any(node.op_type != "DequantizeLinear" for node in stored):  # in float this gains nothing
        return
    narrow, wide = (_constant(node.inputs[0]) for node in stored)
    channels, inputs = narrow.shape[:2]
    blocks = np.zeros((2, 2, channels, inputs, 5, 5), narrow.dtype)  # by row and column in a block
    over = np.zeros((len(wide), 2, 2, channels, 2, 2), wide.dtype)
    for row, column in np.ndindex(2, 2):
        blocks[row, column, :, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] = narrow
    # Row 2i - 1 of the first one's output is the second row of block i - 1; rows 2i and 2i + 1 are block i.
    place = ((0, 1), (1, 0), (1, 1))
    for y, x in np.ndindex(3, 3):
        (block_y, row), (block_x, column) = place[y], place[x]
        over[:, row, column, :, block_y, block_x] = wide[:, :, y, x]
    written = blocks.reshape(4 * channels, inputs, 5, 5), over.reshape(len(wide), 4 * channels, 2, 2)
    for conv, node, name, weights in zip((first, second), stored, ("blocks", "over_blocks"), written, strict=True):
        node.replace_input_with(0, _added(graph, f"stem_{name}", weights))
        _set(conv, kernel_shape=list(weights.shape[2:]), pads=[1, 1, 0, 0])
    _set(first, strides=[4, 4])
    _set(second, strides=[1, 1])
    for node, index in ((first, 2), (stored[0], 1), (stored[0], 2)):
        each = np.tile(_constant(node.inputs[index]), 4)
        node.replace_input_with(index, _added(graph, f"stem_{node.op_type}_{index}", each))
    for value in (first.outputs[0], *(node.outputs[0] for node in between)):
        value.shape = None


def _biases_as_integers(graph: ir.Graph) -> None:
    for layer in (*_nodes(graph, "Conv"), *_nodes(graph, "Gemm")):
        makers = [_maker(value) for value in layer.inputs[:2]]
        bias = _constant(layer.inputs[2]) if len(layer.inputs) > 2 else np.zeros(0)
        if not bias.size or any(node.op_type != "DequantizeLinear" for node in makers):
            continue
        step = (_constant(makers[0].inputs[1]) * _constant(makers[1].inputs[1])).astype(np.float32)
        rounded = np.round(bias / step).astype(np.int32)
        parts = {"integer": rounded, "step": step, "zero": np.zeros_like(rounded)}
        name = layer.outputs[0].name
        inputs = [_added(graph, f"{name}_bias_{part}", array) for part, array in parts.items()]
        node = ir.node("DequantizeLinear", inputs, {"axis": 0})
        node.outputs[0].name = f"{name}_bias"
        layer.prepend(node)
        layer.replace_input_with(2, node.outputs[0])
