"""Check what is in an ONNX file, before an engine sees it.

An engine obeys a model: it reads other files that the model names, loops as long as the model says, and asks for as
much memory as the model's shapes take. So a file is first read here by a closed schema, the part of ONNX's protobuf
that `asc-ray export` writes; every operator is one of a short list, and the shape of every value and the work of every
node are computed, and bounded, for a clip. Whatever is not understood is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asc_ray.runtime.protobuf import MOST_PARTS, Message, NotOurs, parse

MOST_BYTES = 1 << 26  # of a file; the students' have 40 to 200 kB, a CP-ResNet of 600,000 parameters 2 MB
MOST_NODES = 4096
# For one clip: elements of one value and of all, and multiply-accumulates. CP-Mobile has 1e5, 4e6 and 3e7.
MOST_ELEMENTS = 1 << 22
MOST_SUMMED = 1 << 26
MOST_MACS = 1 << 30
MOST_SCRATCH = 1 << 24  # values that a convolution gathers before it multiplies; the networks' have up to 2e6
_MOST_DIMENSION = 1 << 20
_MOST_STEP = 1024  # of a kernel, a stride, a dilation or a padding

Shape = tuple[int, ...]
_TYPES = {number: np.dtype(name) for number, name in ((1, "<f4"), (2, "u1"), (3, "i1"), (6, "<i4"), (7, "<i8"))}
_FLOAT = 1
_CLIPS = 7  # a batch size that no other dimension has by chance
_ATTRIBUTE_TYPES = {1: "f", 2: "i", 3: "s", 7: "ints"}


@dataclass(frozen=True)
class Node:
    """An operator: names of the values that it takes, of the one that it makes, and attributes as ONNX has them."""

    kind: str
    inputs: Sequence[str]
    output: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """`input` and `output`: name and shape without the batch; `metadata`: what the exporter wrote beside the graph;
    `nodes` in the order in which they are computed; `weights` by name."""

    input: tuple[str, Shape]
    output: tuple[str, Shape]
    metadata: Mapping[str, str]
    nodes: Sequence[Node]
    weights: Mapping[str, np.ndarray]


def read_model(content: bytes) -> Model:
    """Read and check a model. Raises NotOurs for what `asc-ray export` would not have written."""
    model = parse("model", memoryview(content), [MOST_PARTS])
    opsets = [(opset.get("domain", ""), opset.get("version")) for opset in model["opset"]]
    if len(opsets) != 1 or opsets[0][0] not in ("", "ai.onnx"):
        raise NotOurs(f"operators of {', '.join(str(domain) for domain, _ in opsets) or 'no'} domain")
    if "graph" not in model:
        raise NotOurs("no graph")
    metadata = {entry.get("key", ""): entry.get("value", "") for entry in model["metadata"]}
    if len(metadata) < len(model["metadata"]):
        raise NotOurs("a key of the metadata occurs twice")
    given, made, weights = _check(model["graph"])
    nodes = [Node(node["kind"], node["input"], node["output"][0], _attributes(node)) for node in model["graph"]["node"]]
    return Model(given, made, metadata, nodes, weights)


def _check(graph: Message) -> tuple[tuple[str, Shape], tuple[str, Shape], Mapping[str, np.ndarray]]:
    """Check the graph, and return its input's and its output's name and shape, without the batch, and the weights."""
    if len(graph["input"]) != 1 or len(graph["output"]) != 1:
        raise NotOurs(f"{len(graph['input'])} inputs and {len(graph['output'])} outputs; one of each is expected")
    if len(graph["node"]) > MOST_NODES:
        raise NotOurs(f"{len(graph['node']):,} nodes; allowed are {MOST_NODES:,}")
    given, made = (_declared(graph[name][0]) for name in ("input", "output"))
    weights: dict[str, np.ndarray] = {}
    for tensor in graph["weight"]:
        weights[_new(weights, tensor.get("name", ""))] = _weight(tensor)
    for batch in (1, _CLIPS):
        _check_shapes(graph, given, made, weights, batch)
    return given, made, weights


def _check_shapes(
    graph: Message, given: tuple[str, Shape], made: tuple[str, Shape], weights: Mapping[str, np.ndarray], batch: int
) -> None:
    """Raise NotOurs where a value of so many clips is too large, too much work, or has no row for each clip."""
    shapes: dict[str, Shape] = {name: weight.shape for name, weight in weights.items()}
    shapes[_new(shapes, given[0])] = (batch, *given[1])
    of_clips = {given[0]}  # values that are computed from the input
    summed = macs = 0
    for node in graph["node"]:
        name, result, work = _infer(node, shapes, weights)
        if not of_clips.isdisjoint(node["input"]):
            of_clips.add(name)
            if result[:1] != (batch,):
                raise NotOurs(f"a {node['kind']} that mixes clips")
        elements = math.prod(result) // batch
        summed += elements
        macs += work // batch
        if elements > MOST_ELEMENTS or summed > MOST_SUMMED or macs > MOST_MACS:
            raise NotOurs(f"a {node['kind']} of shape {result}: more memory or work than a scene classifier takes")
        shapes[_new(shapes, name)] = result
    name, declared = made
    if shapes.get(name) != (batch, *declared) or name not in of_clips:
        raise NotOurs(f"the output {name!r} is said to have the shape {declared}, and has {shapes.get(name)}")


def _new(known: Mapping[str, Any], name: str) -> str:
    if not name or name in known:
        raise NotOurs(f"the value {name!r} is there twice, or has no name")
    return name


def _declared(value: Message) -> tuple[str, Shape]:
    """Return the name and the shape, without the batch, of the graph's input or output."""
    tensor = value.get("type", {}).get("tensor", {})
    batch, *dims = tensor.get("shape", {}).get("dim", []) or [{}]
    sizes = tuple(dim.get("size", 0) for dim in dims)
    if tensor.get("element") != _FLOAT or "parameter" not in batch or not sizes:
        raise NotOurs(f"{value.get('name')!r} is no float tensor with a free batch")
    return value.get("name", ""), _sane(sizes)


def _sane(shape: Sequence[int]) -> Shape:
    if len(shape) > 5 or not all(0 < size <= _MOST_DIMENSION for size in shape):
        raise NotOurs(f"a shape of {list(shape)[:8]}")
    return tuple(shape)


def _weight(tensor: Message) -> np.ndarray:
    dtype = _TYPES.get(tensor.get("type", 0))
    if dtype is None:
        raise NotOurs(f"a weight of ONNX's type {tensor.get('type')}")
    shape, raw = _sane(tensor["dims"]), tensor.get("raw", b"")
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise NotOurs(f"a weight of shape {shape} in {len(raw)} bytes")
    values = np.frombuffer(raw, dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise NotOurs(f"the weight {tensor.get('name')!r} is not finite")
    return values


def _infer(node: Message, shapes: Mapping[str, Shape], weights: Mapping[str, np.ndarray]) -> tuple[str, Shape, int]:
    """Return the name, the shape and the multiply-accumulates of the node's output."""
    kind = node.get("kind", "")
    if node.get("domain", "") not in ("", "ai.onnx") or kind not in _OPERATORS:
        raise NotOurs(f"the operator {node.get('domain') or ''} {kind}".replace("  ", " "))
    _, infer = _OPERATORS[kind]
    attributes = _attributes(node)
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise NotOurs(f"{kind} with auto_pad")
    inputs, outputs = list(node["input"]), node["output"]
    if len(outputs) != 1 or not inputs or (missing := [name for name in inputs if name not in shapes]):
        raise NotOurs(f"a {kind} whose inputs or outputs are not there: {', '.join(map(repr, missing[:3]))}")
    try:
        shape, macs = infer([shapes[name] for name in inputs], [weights.get(name) for name in inputs], attributes)
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        if isinstance(error, NotOurs):
            raise
        raise NotOurs(f"a {kind} that takes {[shapes[name] for name in inputs]} with {attributes}") from None
    return outputs[0], _sane(shape), macs


def _attributes(node: Message) -> dict[str, Any]:
    kind, attributes = node["kind"], {}
    for attribute in node["attribute"]:
        name, field = attribute.get("name", ""), _ATTRIBUTE_TYPES.get(attribute.get("type", 0), "")
        if name not in _OPERATORS[kind][0] or name in attributes:
            raise NotOurs(f"the attribute {name!r} of {kind}")
        own = attribute.get(field)
        if isinstance(own, float) and not math.isfinite(own):
            raise NotOurs(f"the attribute {name!r} of {kind} is not finite")
        attributes[name] = own
    return attributes


_Inputs = list[Shape]
_Constants = list[np.ndarray | None]
_Inferred = tuple[Sequence[int], int]


def _same(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    return inputs[0], 0


def _broadcast(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    return np.broadcast_shapes(*inputs), 0


def _window(inputs: _Inputs, kernel: Sequence[int], attributes: Message) -> list[int]:
    """Return the sizes, frequency and time, that a kernel leaves when it moves over (B, C, F, T)."""
    sizes = inputs[0][2:]
    places = len(kernel)
    strides = attributes.get("strides") or [1] * places
    dilations = attributes.get("dilations") or [1] * places
    pads = attributes.get("pads") or [0] * (2 * places)
    known = len(inputs[0]) == 2 + places and len(strides) == len(dilations) == places and len(pads) == 2 * places
    steps = (*kernel, *strides, *dilations)
    if not known or not all(0 < step <= _MOST_STEP for step in steps) or not all(0 <= p <= _MOST_STEP for p in pads):
        raise ValueError
    rounding = attributes.get("ceil_mode", 0)
    left = []
    for axis, size in enumerate(sizes):
        room = size + pads[axis] + pads[places + axis] - dilations[axis] * (kernel[axis] - 1) - 1
        left.append((room + (strides[axis] - 1 if rounding else 0)) // strides[axis] + 1)
    return left


def _conv(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    batch, channels, *_ = inputs[0]
    out, each, *kernel = inputs[1]
    if attributes.get("kernel_shape", kernel) != kernel or each * attributes.get("group", 1) != channels:
        raise ValueError
    shape = [batch, out, *_window(inputs, kernel, attributes)]
    if each * math.prod(kernel) * math.prod(shape[2:]) > MOST_SCRATCH:
        raise NotOurs(f"a Conv of {kernel} that makes {shape}: more memory or work than a scene classifier takes")
    return shape, math.prod(shape) * each * math.prod(kernel)


def _pool(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    shape = [*inputs[0][:2], *_window(inputs, attributes["kernel_shape"], attributes)]
    return shape, math.prod(shape) * math.prod(attributes["kernel_shape"])


def _global_pool(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    return [*inputs[0][:2], *[1 for _ in inputs[0][2:]]], math.prod(inputs[0])


def _reduce(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    rank = len(inputs[0])
    axes = list(range(rank)) if len(inputs) < 2 else _constant(constants[1])
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError
    over = {axis % rank for axis in axes}
    shape = [1 if axis in over else size for axis, size in enumerate(inputs[0])]
    if not attributes.get("keepdims", 1):
        shape = [size for axis, size in enumerate(shape) if axis not in over]
    return shape, math.prod(inputs[0])


def _reshape(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    wanted = _constant(constants[1])
    if not attributes.get("allowzero", 0):
        wanted = [inputs[0][axis] if size == 0 else size for axis, size in enumerate(wanted)]
    elements, known = math.prod(inputs[0]), math.prod(size for size in wanted if size != -1)
    shape = [elements // known if size == -1 else size for size in wanted]
    if wanted.count(-1) > 1 or math.prod(shape) != elements:
        raise ValueError
    return shape, 0


def _transpose(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    order = attributes["perm"]
    if sorted(order) != list(range(len(inputs[0]))):
        raise ValueError
    return [inputs[0][axis] for axis in order], 0


def _slice(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    starts, ends, axes, steps = map(_constant, constants[1:])
    shape = list(inputs[0])
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        shape[axis] = len(range(inputs[0][axis])[start:end:step])
    if len(set(axes)) < len(axes) or min(axes) < 1:  # along axis 0 the clips would change places
        raise ValueError
    return shape, 0


def _concat(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    axis = attributes["axis"]
    rest = {(*shape[:axis], *shape[axis:][1:]) for shape in inputs}
    if axis < 0 or len(rest) > 1:
        raise ValueError
    return [*inputs[0][:axis], sum(shape[axis] for shape in inputs), *inputs[0][axis + 1 :]], 0


def _gemm(inputs: _Inputs, constants: _Constants, attributes: Message) -> _Inferred:
    rows, inner = inputs[0][::-1] if attributes.get("transA", 0) else inputs[0]
    own, columns = inputs[1][::-1] if attributes.get("transB", 0) else inputs[1]
    if own != inner or (len(inputs) > 2 and np.broadcast_shapes((rows, columns), inputs[2]) != (rows, columns)):
        raise ValueError
    return [rows, columns], rows * inner * columns


def _constant(weight: np.ndarray | None) -> list[int]:
    if weight is None or weight.dtype.kind != "i" or weight.ndim > 1 or weight.size > 8:
        raise ValueError
    return [int(value) for value in np.atleast_1d(weight)]


_PLACES = ("kernel_shape", "strides", "pads", "dilations", "auto_pad")
# The operators that exported networks have, with the attributes that exporters write.
_OPERATORS: Mapping[str, tuple[tuple[str, ...], Callable[[_Inputs, _Constants, Message], _Inferred]]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max"), ((), _broadcast)),
    **dict.fromkeys(("Relu", "Sqrt", "Reciprocal"), ((), _same)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (("axis",), _same)),
    **dict.fromkeys(("ReduceMean", "ReduceL2"), (("keepdims", "noop_with_empty_axes"), _reduce)),
    "InstanceNormalization": (("epsilon",), _same),
    "Conv": ((*_PLACES, "group"), _conv),
    "MaxPool": ((*_PLACES, "ceil_mode", "storage_order"), _pool),
    "AveragePool": ((*_PLACES, "ceil_mode", "count_include_pad"), _pool),
    "GlobalAveragePool": ((), _global_pool),
    "Reshape": (("allowzero",), _reshape),
    "Transpose": (("perm",), _transpose),
    "Slice": ((), _slice),
    "Concat": (("axis",), _concat),
    "Gemm": (("alpha", "beta", "transA", "transB"), _gemm),
}
