"""Quantization-aware training and int8 models: the 'fbgemm' scheme on exported graphs (torch.export, torchao PT2E).

The scheme: weights int8, symmetric, one scale a channel; activations uint8, affine, one scale a tensor, ranges by
moving averages of minimum and maximum, which fall on 0..127 (reduced range: of values within it, the sum of two u8 x s8
products fits 16 bits, as processors without VNNI add them; what is beyond goes on to 255). Every convolution with its
folded batch norm and ReLU, every residual sum, pool and linear layer computes from 8-bit values. The normalization
between the stages is computed in float, and the logits are float.
"""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

# What torch and torchao say that nobody who runs this can act upon, by logger.
_NOISE = {
    "torchao": "Failed to load",  # kernels of other GPUs and Python versions, which PT2E does without
    "torch.utils._pytree": "<enum 'KernelPreference'>",  # torchao's own use of a deprecated registration
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
}


def _silence(logger: str, start: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(start))


for _logger, _start in _NOISE.items():
    _silence(_logger, _start)

from torchao.quantization.pt2e import (  # noqa: E402
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import (  # noqa: E402
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationSpecBase  # noqa: E402

aten = torch.ops.aten
CONVOLUTION = aten.conv2d.default
LAYERS = (CONVOLUTION, aten.linear.default)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
RELUS = (aten.relu.default, aten.relu_.default)
POOLS = (aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default)
MAX_POOL = aten.max_pool2d.default  # chooses among 8-bit values: its output is on the same grid
BATCH_NORM = aten.batch_norm.default
MOST_STEPS = 2**30  # of a bias on its grid, within int32
DEQUANTIZE = (
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_channel.default,
)
QUANTIZE = (
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.quantize_per_channel.default,
)


class RangeFollower(FakeQuantize):
    """torchao's fake quantization to the bit, without its looks at values, each of which waits for a GPU.

    The first batch's minimum and maximum are the range, later ones move it by the observer's averaging constant.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.follows = True

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled)
        self.follows = enabled

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.follows:
            self._follow(x.detach())
        return self._rounded(x)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        observer: Any = self.activation_post_process
        low, high = torch.aminmax(x.flatten(1), dim=1) if self.is_per_channel else torch.aminmax(x)
        for own, new, none in ((observer.min_val, low, torch.inf), (observer.max_val, high, -torch.inf)):
            if own.shape != new.shape:  # of channels, before the first batch
                own.resize_(new.shape).fill_(none)
            own.copy_(torch.where(own == none, new, own + observer.averaging_constant * (new - own)))
        low, high = observer.min_val.clamp(max=0), observer.max_val.clamp(min=0)
        steps = float(observer.quant_max - observer.quant_min)
        if self.is_per_channel:  # symmetric
            scale = torch.maximum(torch.maximum(-low, high) / (steps / 2), observer.eps)
            zero_point = torch.zeros_like(scale)
        else:
            scale = torch.maximum((high - low) / steps, observer.eps)
            zero_point = (observer.quant_min - torch.round(low / scale)).clamp(observer.quant_min, observer.quant_max)
        self.scale.resize_(scale.numel()).copy_(scale)
        self.zero_point.resize_(scale.numel()).copy_(zero_point)

    def _rounded(self, x: Tensor) -> Tensor:
        # A zero point that is a whole number is looked at by torch; the channels' are all zero.
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point.float(), self.ch_axis, self.quant_min, self.quant_max
        )


class FakeQuantizeActivation(RangeFollower):
    """The range falls on 0..127, and what exceeds it is cut off at 255, as engines do that know no smaller uint8."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.quant_max = 255  # of the rounding here and after conversion; the observer keeps 127

    def _rounded(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.quant_min, self.quant_max)


# Not torchao's fused kernel: its grids differ from those it converts to, even in the zero point of a channel of weights
# that are all of one sign.
ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=127,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=FakeQuantizeActivation.with_args(observer=MovingAverageMinMaxObserver),
)
WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=RangeFollower.with_args(observer=MovingAveragePerChannelMinMaxObserver),
)


class FbgemmQuantizer(Quantizer):
    """Says where in an exported graph the scheme quantizes.

    A sum is residual when one of its terms is a convolution's output that nothing else takes: the sums inside RN and
    GRN are not, and stay float.
    """

    def annotate(self, model: GraphModule) -> GraphModule:
        convolved: set[Node] = set()
        for node in model.graph.nodes:
            if node.target in LAYERS:
                inputs = {node.args[0]: ACTIVATION, node.args[1]: WEIGHT}
            elif node.target in POOLS:
                inputs = {node.args[0]: ACTIVATION}
            elif node.target is MAX_POOL:
                source = node.all_input_nodes[0]
                _annotate(node, {source: ACTIVATION}, SharedQuantizationSpec((source, node)))
                continue
            elif node.target in SUMS and convolved.intersection(node.all_input_nodes):
                inputs = dict.fromkeys(node.all_input_nodes, ACTIVATION)
            else:
                continue
            _annotate(node, inputs, None)
            if node.target is CONVOLUTION or node.target in SUMS:
                end = _end_of_block(node)
                _annotate(end, inputs if end is node else {}, ACTIVATION)
                if node.target is CONVOLUTION and len(end.users) == 1:
                    convolved.add(end)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: `convert` checks what came of it."""


def _annotate(node: Node, inputs: dict[Node, QuantizationSpec], output: QuantizationSpecBase | None) -> None:
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=dict(inputs), output_qspec=output, _annotated=True
    )


def _end_of_block(node: Node) -> Node:
    """The batch norm or ReLU that ends what is computed in one go with the convolution or sum `node`."""
    for following in ((BATCH_NORM,), RELUS) if node.target is CONVOLUTION else (RELUS,):
        if len(node.users) == 1 and (user := next(iter(node.users))).target in following:
            node = user
    return node


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch copies its own deprecated tree specs.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*isinstance\\(treespec, LeafSpec\\)")
        yield


def prepare(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the trained `model` for quantization-aware training; `example` (2, 1, F, T) gives the input's shape.

    Call it like any network, with any batch size; `set_training` stands in for `train` and `eval`, which exported
    graphs lack. The ranges of the activations start with the first batch in training, and an evaluation before that is
    meaningless. Its state dict loads into another module prepared from the same configuration.
    """
    with quiet():
        graph = _export(copy.deepcopy(model).train(), example)
        _drop_batch_counts(graph)
        return prepare_qat_pt2e(graph, FbgemmQuantizer())


def set_training(model: nn.Module, training: bool) -> None:
    """Training: batch norms take the batch's statistics, fake quantization follows the ranges. Evaluation: neither."""
    assert isinstance(model, GraphModule)
    for node in model.graph.nodes:
        if node.target is BATCH_NORM:
            node.update_arg(5, training)
    model.recompile()
    _follow(model, training)


def _follow(model: nn.Module, ranges: bool) -> None:
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.enable_observer(ranges)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Calibration after training: ranges become the means of all batches' that run through, in evaluation form."""
    set_training(model, False)
    _follow(model, True)
    averages: list[Any] = [module for module in model.modules() if hasattr(module, "averaging_constant")]
    constant, batches = averages[0].averaging_constant, 0

    def weigh(*_: object) -> None:
        nonlocal batches
        batches += 1
        for module in averages:
            module.averaging_constant = 1 / batches

    hook = model.register_forward_pre_hook(weigh)
    yield
    hook.remove()
    for module in averages:
        module.averaging_constant = constant
    _follow(model, False)


def freeze(model: nn.Module) -> None:
    """Fix ranges and batch-norm statistics as they are while the weights go on learning, until `set_training`."""
    set_training(model, False)  # the networks have no layer, as dropout, whose training form would be missed


@torch.no_grad()
def round_biases(model: nn.Module) -> None:
    """Put the biases of a trained, prepared `model` where engines have them: int32 in steps of input x weight scale.

    A step is a hundredth or less of the output's, but every thousandth value is rounded to its other side by that, and
    from layer to layer they become more: without this an engine's logits differ by some hundredths from torch's.
    """
    assert isinstance(model, GraphModule)
    modules: dict[Any, Any] = dict(model.named_modules(remove_duplicate=False))
    norms: dict[Any, tuple[Tensor, Tensor]] = {}  # of a convolution: its batch norm's shift, and what is taken from it
    for norm in [node for node in model.graph.nodes if node.target is BATCH_NORM]:
        convolution, _, moved = _evaluated(model, norm)
        norms[convolution] = _attribute(model, norm.args[2].target), moved.double()
    for node in model.graph.nodes:
        if node.target not in LAYERS:
            continue
        if node in norms:
            bias, moved = norms[node]
        elif len(node.args) > 2 and node.args[2] is not None and node.args[2].op == "get_attr":
            bias, moved = _attribute(model, node.args[2].target), torch.zeros((), dtype=torch.float64)
        else:
            continue
        x, weight = modules[node.args[0].target], modules[node.args[1].target]
        folded, grid = bias - moved, x.scale.double()
        _widen(weight, folded.abs() / grid / MOST_STEPS)
        step = grid * weight.scale.double()
        bias.copy_(torch.round(folded / step) * step + moved)


def _widen(weight: Any, least: Tensor) -> None:
    """No step of a channel's grid is below `least`: one whose weights are nothing beside its bias would need a bias
    that int32 cannot hold."""
    narrow = weight.scale < least
    if narrow.any():
        weight.scale[narrow] = least[narrow].float()
        weight.activation_post_process.max_val[narrow] = weight.scale[narrow] * (WEIGHT.quant_max + 0.5)


def convert(model: nn.Module) -> nn.Module:
    """The int8 model of a prepared and trained `model`, which stays as it is, with rounded biases; on the CPU.

    Raises RuntimeError if a batch norm was not folded or a convolution or linear layer has weights other than int8.
    """
    with quiet():
        folded = copy.deepcopy(model).cpu()
        assert isinstance(folded, GraphModule)
        set_training(folded, False)
        round_biases(folded)
        _fold_batch_norms(folded)
        int8 = convert_pt2e(folded, fold_quantize=True)
        _drop_unused(int8)
    _check(int8)
    for module in int8.modules():
        module.training = False  # an exported graph refuses eval()
    for zero_point in int8.buffers():
        if zero_point.dtype == torch.int64:
            zero_point.data = zero_point.int()
    return int8.requires_grad_(False)


def operators(model: nn.Module) -> list[tuple[str, str, str]]:
    """(name, operator, "int8" | "float32") of all that a converted model computes, in order.

    An operator is int8 if it has an 8-bit kernel and all it takes was 8-bit before: an engine that joins it with the
    quantization and dequantization around it needs no float there.
    """
    int8: set[Node] = set()
    rows = []
    for node in _graph(model).nodes:
        if node.op != "call_function" or node.target in (*QUANTIZE, *DEQUANTIZE):
            continue
        has_kernel = node.target in (*LAYERS, *SUMS, *RELUS, *POOLS, MAX_POOL, aten.flatten.using_ints)
        computed = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if has_kernel and all(source.target in DEQUANTIZE or source in int8 for source in computed):
            int8.add(node)
        rows.append((node.name, str(node.target), "int8" if node in int8 else "float32"))
    return rows


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Bytes of all tensors a converted model holds: int8 weights, float32 scales and biases, integer zero points."""
    count: Counter[str] = Counter()
    for tensor in model.state_dict().values():
        count[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(count)


FREE_BATCH = ({0: torch.export.Dim("batch")},)


def _export(model: nn.Module, example: Tensor) -> GraphModule:
    return torch.export.export(model, (example,), dynamic_shapes=FREE_BATCH).module()


def example_of(model: nn.Module) -> Tensor:
    """Zeros of the shape that the model was exported with, two clips of them."""
    taken = next(node for node in _graph(model).nodes if node.op == "placeholder")
    return torch.zeros(2, *taken.meta["val"].shape[1:])


def _graph(model: nn.Module) -> torch.fx.Graph:
    assert isinstance(model, GraphModule)
    return model.graph


def _drop_batch_counts(model: GraphModule) -> None:
    """Remove `num_batches_tracked += 1`, which would count in evaluation too; nothing reads it."""
    for node in list(model.graph.nodes):
        if node.target is aten.add_.Tensor and node.args[0].op == "get_attr":
            assert node.args[0].target.endswith("num_batches_tracked"), node.args[0].target
            model.graph.erase_node(node)
    _drop_unused(model)


def _drop_unused(model: GraphModule) -> None:
    """Remove parameters and buffers that the graph does not read, such as the float weights of folded layers."""
    model.graph.eliminate_dead_code()
    used = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)
    model.recompile()


@torch.no_grad()
def _fold_batch_norms(model: GraphModule) -> None:
    """Leave no batch norm in a prepared graph: in evaluation it is x * scale + shift.

    In training torchao multiplies a convolution's weight by the scale before rounding it and divides the output by it
    again, so the product is the folded weight and the shift its bias. (torchao's own folding does the same in 15
    seconds: it traces 96 patterns to search for.) A batch norm between the stages stays a product and a sum in float.
    """
    graph = model.graph
    for node in [node for node in graph.nodes if node.target is BATCH_NORM]:
        x, *sources = node.args[:3]
        gamma, beta = (_attribute(model, source.target) for source in sources)
        result, scale, moved = _evaluated(model, node)
        beta.sub_(moved)
        if result is not None:
            rounded = result.args[1]
            weight = rounded.args[0].args[0]
            _attribute(model, weight.target).mul_(scale.reshape(-1, 1, 1, 1))
            rounded.update_arg(0, weight)
            result.args = (*result.args[:2], sources[1], *result.args[3:])
        elif x.op in ("call_module", "placeholder"):  # what another block left, rounded, or the mels
            gamma.data = scale.reshape(-1, 1, 1)
            beta.data = beta.reshape(-1, 1, 1)
            with graph.inserting_before(node):
                product = graph.call_function(aten.mul.Tensor, (x, sources[0]))
                result = graph.call_function(aten.add.Tensor, (product, sources[1]))
        else:
            raise RuntimeError(f"no rule folds the batch norm {node.format_node()}")
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    graph.lint()
    model.recompile()


def _evaluated(model: GraphModule, norm: Any) -> tuple[Any, Tensor, Tensor]:
    """(convolution, scale, moved): in evaluation the batch norm is scale x + shift - moved.

    x is what the convolution gives before its bias, in torchao's form for training; with another input there is None.
    """
    x, *sources = norm.args[:5]
    gamma, _, mean, variance = (_attribute(model, source.target) for source in sources)
    scale = gamma / torch.sqrt(variance + norm.args[7])
    biased = x.target is aten.add.Tensor and x.args[1].target is aten.reshape.default
    divided = x.args[0] if biased else x
    if divided.target is not aten.div.Tensor or divided.args[0].target is not CONVOLUTION:
        return None, scale, mean * scale
    if biased:
        mean = mean - _attribute(model, x.args[1].args[0].target)
    return divided.args[0], scale, mean * scale


def _attribute(model: GraphModule, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _check(model: GraphModule) -> None:
    for node in model.graph.nodes:
        if node.op == "call_function" and "batch_norm" in str(node.target):
            raise RuntimeError(f"conversion left a batch norm: {node.format_node()}")
        if node.target in LAYERS:
            weight = node.args[1]
            stored = weight.args[0] if weight.target in DEQUANTIZE else weight
            if stored.op != "get_attr" or _attribute(model, stored.target).dtype != torch.int8:
                raise RuntimeError(f"conversion left a layer without int8 weights: {node.format_node()}")
