"""From the ONNX file of a bundle to the layers of the C form."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asc_ray.embedded.layers import (
    Convolution,
    Grid,
    Layer,
    Linear,
    MaxPool,
    Mean,
    MeanLogits,
    Network,
    ResidualNorm,
    ResponseNorm,
    Sum,
    Unknown,
    taken,
)
from asc_ray.runtime.onnx_file import Model, Node

MOST_POSITIONS = 1 << 15  # of a value that is normalized: sums of squares stay below 2^32
PLANE = [2, 3]
_NONE = Node("an input", (), "", {})


def read_network(model: Model) -> Network:
    """Return the layers that compute what the model computes. Raises Unknown for an operator that has no C form."""
    reader = _Reader(model)
    for node in model.nodes:
        try:
            reader.read(node)
        except (KeyError, IndexError, TypeError, ValueError) as error:  # of a form that `asc-ray export` does not write
            raise (
                error if isinstance(error, Unknown) else Unknown(f"{node.kind} of another form ({node.output})")
            ) from None
    layers = [*reader.layers, reader.last()]
    if reader.input is None:
        raise Unknown("no QuantizeLinear of the log-mel")
    return Network(reader.input, _unpadded(_unblocked(layers)), model.output[1][0])


class _Reader:
    """Each quantization ends a layer; what lies between it and the 8-bit values before it says which."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._makers = {node.output: node for node in model.nodes}
        self._grids: dict[str, Grid] = {}  # by name of the 8-bit value, and of its dequantized form
        self._stored: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # dequantized weights: integers and steps
        self.layers: list[Layer] = []
        self.input: Grid | None = None

    def read(self, node: Node) -> None:
        if node.kind == "DequantizeLinear":
            source, scale, zero = node.inputs
            if source in self._grids:
                self._grids[node.output] = self._grids[source]
            elif source in self._model.weights:
                if np.any(self._model.weights[zero]):
                    raise self._unknown(node, "weights with a zero point other than 0")
                self._stored[node.output] = self._model.weights[source], self._model.weights[scale]
            else:
                raise self._unknown(node)
        elif node.kind == "QuantizeLinear":
            self._grids[node.output] = self._layer(node)

    def last(self) -> Layer:
        node = self._maker(self._model.output[0])
        if node.kind == "Reshape":
            node = self._maker(node.inputs[0])
        x = self._grids.get(node.inputs[0]) if node.inputs else None
        outputs = self._model.output[1]
        if node.kind == "GlobalAveragePool" and x and outputs == (x.channels,):
            return MeanLogits(x)
        if node.kind == "Gemm" and x and x.positions == 1 and all(name in self._stored for name in node.inputs[1:]):
            weights, steps = self._stored[node.inputs[1]]
            at, bias = node.attributes, self._stored[node.inputs[-1]][0]
            weights = weights if at.get("transB") else weights.T
            plain = (at.get("alpha"), at.get("beta"), at.get("transA", 0)) == (1.0, 1.0, 0)
            if plain and len(node.inputs) == 3 and (*outputs, x.channels) == weights.shape and weights.dtype == np.int8:
                return Linear(x, weights, _less_zeros(bias, weights, x), _multiplier(x.step, steps, len(weights)))
        raise self._unknown(node, "before the logits")

    def _layer(self, quantize: Node) -> Grid:
        """Add the layer that ends with this quantization, and return what it makes."""
        name, scale, zero = quantize.inputs
        step, zero_point = np.float32(self._model.weights[scale].item()), int(self._model.weights[zero].item())
        if self._model.weights[zero].dtype != np.uint8:
            raise self._unknown(quantize, "of another type than uint8")

        def grid(channels: int, height: int, width: int) -> Grid:
            return Grid(quantize.output, channels, height, width, step, zero_point)

        if step < np.finfo(np.float32).tiny:
            raise self._unknown(quantize, f"of the step {step}")
        if name == self._model.input[0]:
            own, first = grid(*self._model.input[1]), self.input
            if first and (first.step, first.zero) != (step, zero_point):
                raise self._unknown(quantize, "of the log-mel in two ways")
            self.input = first or own
            return self.input
        node, low, window = self._maker(name), 0, (1, 1)
        if node.kind == "Max" and self._number(node.inputs[1]) == np.finfo(np.float32).min:
            node = self._maker(node.inputs[0])
        if node.kind == "MaxPool":
            window = self._window(node)
            if node.inputs[0] not in self._grids:
                node = self._maker(node.inputs[0])
        if node.kind == "Relu":
            low, node = zero_point, self._maker(node.inputs[0])
        sources = [self._grids[name] for name in node.inputs if name in self._grids]
        if node.kind in ("MaxPool", "Reshape") and sources and (sources[0].step, sources[0].zero) != (step, zero_point):
            raise self._unknown(node, "that changes the grid")
        if node.kind == "Reshape" and sources and sources[0].positions == 1:
            return sources[0]
        layer = self._plain(node, sources, grid, low, window) or self._normalized(node, grid, low, window)
        if layer is None:
            floats = self._floats(node)
            raise self._unknown(node, f"of {', '.join(sorted(floats))} in float" if floats else "")
        self.layers.append(layer)
        return layer.y

    def _plain(self, node: Node, sources: Sequence[Grid], grid: Any, low: int, window: tuple[int, int]) -> Any:
        """Return the layer of a node that takes 8-bit values, or None."""
        if node.kind == "MaxPool" and sources:
            (x,) = sources
            return MaxPool(x, grid(x.channels, *_pooled(x, window)), window)
        if not sources or window != (1, 1):
            return None
        x = sources[0]
        if node.kind == "Conv":
            return self._convolution(node, x, grid, low)
        if node.kind == "Add" and len(sources) == 2:
            a, b = sources
            if a.bytes != b.bytes:
                raise self._unknown(node, "of two shapes")
            return Sum(a, b, grid(a.channels, a.height, a.width), low)
        return Mean(x, grid(x.channels, 1, 1)) if node.kind == "GlobalAveragePool" and not low else None

    def _normalized(self, node: Node, grid: Any, low: int, window: tuple[int, int]) -> Any:
        """Return the layer of a normalization of an 8-bit value, or None."""
        for match in (self._residual, self._response):
            if found := match(node):
                x, layer, numbers = found
                if x.positions > MOST_POSITIONS:
                    raise self._unknown(node, f"over more than {MOST_POSITIONS:,} positions")
                return layer(x, grid(x.channels, *_pooled(x, window)), *numbers, window, low)
        return None

    def _convolution(self, node: Node, x: Grid, grid: Any, low: int) -> Convolution:
        at = node.attributes
        if node.inputs[1] not in self._stored or any(name not in self._stored for name in node.inputs[2:]):
            raise self._unknown(node, "with float weights")
        weights, steps = self._stored[node.inputs[1]]
        bias = self._stored[node.inputs[2]][0] if len(node.inputs) > 2 else np.zeros(len(weights), np.int32)
        group, pads, strides = at.get("group", 1), at.get("pads") or [0] * 4, at.get("strides") or [1, 1]
        depthwise = group > 1
        if weights.dtype != np.int8 or weights.ndim != 4 or (set(at.get("dilations") or [1]) != {1}):
            raise self._unknown(node, "with dilation, or other weights than int8 of two dimensions")
        if weights.shape[1] * group != x.channels:
            raise self._unknown(node, f"of {x.channels} channels in another order")
        if depthwise and (group != x.channels or len(weights) != group or weights.shape[2:] != (3, 3)):
            raise self._unknown(node, f"of {group} groups, {list(weights.shape)}; depthwise kernels have 3x3")
        if depthwise and (pads[:2] not in ([0, 0], [1, 1]) or x.width < 2):
            raise self._unknown(node, f"depthwise with the padding {pads}")
        height, width = (
            (size + pads[axis] + pads[2 + axis] - weights.shape[2 + axis]) // strides[axis] + 1
            for axis, size in enumerate((x.height, x.width))
        )
        y = grid(len(weights), height, width)
        multiplier = _multiplier(x.step, steps, len(weights), y.step)
        return Convolution(x, y, weights, _less_zeros(bias, weights, x), multiplier, strides, pads, depthwise, low)

    def _residual(self, node: Node) -> tuple[Grid, Any, tuple[Any, ...]] | None:
        """Match residual * x + gain * IN(inner * x)."""
        parts = list(node.inputs) if node.kind == "Add" else [node.output]
        norms = [name for name in parts if self._maker(name).kind == "InstanceNormalization"]
        if len(norms) != 1 or len(parts) > 2:
            return None
        norm = self._maker(norms[0])
        gains, shifts = (np.unique(self._model.weights.get(name, np.zeros(2))) for name in norm.inputs[1:])
        x, inner = self._scaled(norm.inputs[0])
        other = [self._scaled(name) for name in parts if name != norms[0]]
        residual = other[0][1] if other else np.float32(0)
        if x is None or len(gains) > 1 or shifts.any() or any(own is not x for own, _ in other):
            return None
        eps = np.float32(norm.attributes["epsilon"])
        return x, ResidualNorm, (residual, inner, np.float32(gains[0]), eps)

    def _response(self, node: Node) -> tuple[Grid, Any, tuple[Any, ...]] | None:
        """Match x + gamma * (x * (g / (mean(g) + eps))) + beta."""
        beta, added = self._split(node, "Add")
        x, product = self._with_grid(added, "Add")
        gamma, product = self._split(product, "Mul")
        own, relative = self._with_grid(product, "Mul")
        if relative.kind != "Div" or x is None or own is not x or beta is None or gamma is None:
            return None
        norm = self._maker(relative.inputs[0])
        eps, mean = self._split(self._maker(relative.inputs[1]), "Add")
        known = norm.kind == "ReduceL2" and self._grids.get(norm.inputs[0]) is x and self._axes(norm) == PLANE
        averaged = mean.kind == "ReduceMean" and mean.inputs[0] == norm.output and self._axes(mean) == [1]
        return (x, ResponseNorm, (gamma, beta, eps)) if known and averaged and eps is not None else None

    def _scaled(self, name: str) -> tuple[Grid | None, np.float32]:
        """Return x and the factor of factor * x."""
        if name in self._grids:
            return self._grids[name], np.float32(1)
        x, _ = self._with_grid(node := self._maker(name), "Mul")
        factor, _ = self._split(node, "Mul")
        return (x, factor) if x and factor is not None else (None, np.float32(0))

    def _split(self, node: Node, kind: str) -> tuple[np.float32 | None, Node]:
        """Return the number and the maker of the other term of a sum or product with a number."""
        for own, other in ((0, 1), (1, 0)) if node.kind == kind else ():
            if (number := self._number(node.inputs[own])) is not None:
                return number, self._maker(node.inputs[other])
        return None, _NONE

    def _with_grid(self, node: Node, kind: str) -> tuple[Grid | None, Node]:
        """Return the 8-bit term of a sum or product, and the maker of the other."""
        for own, other in ((0, 1), (1, 0)) if node.kind == kind else ():
            if x := self._grids.get(node.inputs[own]):
                return x, self._maker(node.inputs[other])
        return None, _NONE

    def _number(self, name: str) -> np.float32 | None:
        weight = self._model.weights.get(name)
        return np.float32(weight.item()) if weight is not None and weight.size == 1 else None

    def _axes(self, node: Node) -> list[int]:
        axes = self._model.weights.get(node.inputs[1]) if len(node.inputs) > 1 else None
        return sorted(int(axis) % 4 for axis in np.ravel(axes)) if axes is not None else []

    def _window(self, node: Node) -> tuple[int, int]:
        at: Mapping[str, Any] = node.attributes
        window = tuple(at["kernel_shape"])
        plain = set(at.get("pads") or [0]) == {0} and set(at.get("dilations") or [1]) == {1} and not at.get("ceil_mode")
        if len(window) != 2 or tuple(at.get("strides") or (1, 1)) != window or not plain:
            raise self._unknown(node, f"with {dict(at)}")
        return window[0], window[1]

    def _floats(self, node: Node) -> set[str]:
        """Return the operators between the 8-bit values, or the mel, and a node that computes with floats."""
        seen: dict[str, Node] = {}
        waiting = [node]
        while waiting:
            names = [name for name in waiting.pop().inputs if name in self._makers and name not in self._grids]
            above = {name: self._makers[name] for name in names if name not in seen and name not in self._stored}
            seen |= above
            waiting += above.values()
        return {own.kind for own in seen.values()}

    def _maker(self, name: str) -> Node:
        return self._makers.get(name, _NONE)

    def _unknown(self, node: Node, what: str = "") -> Unknown:
        return Unknown(f"{node.kind} {what} ({node.output})".replace("  ", " "))


def _pooled(x: Grid, window: tuple[int, int]) -> tuple[int, int]:
    return x.height // window[0], x.width // window[1]


def _multiplier(step: np.float32, steps: np.ndarray, outputs: int, out_step: np.float32 | None = None) -> np.ndarray:
    """Return the float32 factors of the sums, in onnxruntime's order. Raises Unknown where one is not finite."""
    factors = step * steps.astype(np.float32)
    factors = np.broadcast_to(factors if out_step is None else factors / out_step, outputs)
    if not np.isfinite(factors).all():
        raise Unknown("weights whose steps are no numbers")
    return factors


def _less_zeros(bias: np.ndarray, weights: np.ndarray, x: Grid) -> np.ndarray:
    """Return the bias less the products of the input's zero point. Raises Unknown where a sum could pass int32."""
    sums = weights.astype(np.int64).reshape(len(weights), -1)
    if bias.shape != (len(weights),):
        raise Unknown(f"a layer behind {x.name} with biases of the shape {bias.shape}")
    moved = bias.astype(np.int64) - x.zero * sums.sum(axis=1)
    if (abs(moved) + 255 * abs(sums).sum(axis=1) >= 2**31).any():
        raise Unknown(f"a layer behind {x.name} whose sums pass 32 bits")
    return moved


def _unblocked(layers: Sequence[Layer]) -> list[Layer]:
    """Undo `onnx_form._block_the_stem`: 5x5 with stride 4 for blocks of 2 x 2 become 3x3 with stride 2 again."""
    if len(layers) < 2:
        return list(layers)
    first, second, *others = layers
    if (
        not (isinstance(first, Convolution) and isinstance(second, Convolution))
        or (first.weights.shape[2:], second.weights.shape[2:]) != ((5, 5), (2, 2))
        or [*first.strides, *first.pads, *second.strides, *second.pads] != [4, 4, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    ):
        return list(layers)
    channels = first.y.channels // 4
    narrow = first.weights[:channels, :, :3, :3]
    over = second.weights.reshape(-1, 2, 2, channels, 2, 2)  # (O, row and column in a block, I, block's row and column)
    wide = np.zeros((second.y.channels, channels, 3, 3), np.int8)
    place = ((0, 1), (1, 0), (1, 1))  # of a kernel's row: which block, which row in it
    for y, x in np.ndindex(3, 3):
        (block_y, row), (block_x, column) = place[y], place[x]
        wide[:, :, y, x] = over[:, row, column, :, block_y, block_x]
    if 4 * abs(narrow.astype(int)).sum() != abs(first.weights.astype(int)).sum() or (
        abs(wide.astype(int)).sum() != abs(second.weights.astype(int)).sum()
    ):
        raise Unknown(f"Conv in blocks, of weights that are none of 3x3 ({first.y.name})")
    y = replace(first.y, channels=channels, height=2 * first.y.height, width=2 * first.y.width)
    shape: dict[str, Any] = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    one: dict[str, Any] = {"bias": first.bias[:channels], "multiplier": first.multiplier[:channels]}
    return [replace(first, y=y, weights=narrow, **one, **shape), replace(second, x=y, weights=wide, **shape), *others]


def _unpadded(layers: Sequence[Layer]) -> list[Layer]:
    """Undo `onnx_form._pad_depthwise`: drop the channels of zeros around depthwise convolutions."""
    result = list(layers)
    for n in range(len(result) - 2):
        first, depthwise, last = result[n : n + 3]
        if not (
            isinstance(first, Convolution)
            and isinstance(depthwise, Convolution)
            and isinstance(last, Convolution)
            and depthwise.depthwise
            and not (first.depthwise or last.depthwise)
            and (depthwise.x, last.x) == (first.y, depthwise.y)
            and sum(grid in (first.y, depthwise.y) for layer in layers for grid in taken(layer)) == 2
        ):
            continue
        used = (
            np.any(first.weights, axis=(1, 2, 3))
            | np.any(depthwise.weights, axis=(1, 2, 3))
            | np.any(last.weights, axis=(0, 2, 3))
        )
        kept = int(used.sum())
        x, y = replace(first.y, channels=kept), replace(depthwise.y, channels=kept)
        result[n] = _rows(first, used, y=x)
        result[n + 1] = _rows(depthwise, used, x=x, y=y)
        result[n + 2] = replace(last, x=y, weights=last.weights[:, used])
    return result


def _rows(layer: Convolution, kept: np.ndarray, **grids: Any) -> Convolution:
    arrays: dict[str, Any] = {name: getattr(layer, name)[kept] for name in ("weights", "bias", "multiplier")}
    return replace(layer, **arrays, **grids)
