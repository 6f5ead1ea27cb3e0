"""Quantization-aware training and int8 models: the 'fbgemm' scheme on exported graphs (torch.export, torchao PT2E).

The scheme: weights int8, symmetric, one scale a channel; activations uint8, affine, one scale a tensor, ranges by
moving averages of minimum and maximum. A range falls on 0..127, so that the sum of two u8 x s8 products fits 16 bits,
in which processors without VNNI add them; values beyond the range go on to 255. Every convolution with its folded batch
norm and ReLU, every residual sum, pool and linear layer computes from 8-bit values. The normalization between the
stages is computed in float, and the logits are float.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

# Messages of torch and torchao that a user cannot act upon, by logger.
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
DEQUANTIZE = (
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_channel.default,
)
QUANTIZE = (
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.quantize_per_channel.default,
)


class RangeFollower(FakeQuantize):
    """torchao's fake quantization to the bit, but without reading values on the host, which waits for a GPU.

    The first batch's minimum and maximum are the range. Later ones move it by the observer's averaging constant.
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
            if own.shape != new.shape:  # one a channel, before the first batch
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
        # torch reads the values of an integer zero point, so it is a float; the channels' are all zero.
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point.float(), self.ch_axis, self.quant_min, self.quant_max
        )


class FakeQuantizeActivation(RangeFollower):
    """Fake quantization whose range falls on 0..127; larger values are cut off at 255, as an engine's uint8 is."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.quant_max = 255  # for the rounding here and after conversion; the observer keeps 127

    def _rounded(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.quant_min, self.quant_max)


# Not torchao's fused kernel, because its grids differ from those it converts to, even in the zero point of a channel
# whose weights all have one sign.
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
    """The quantizer that marks in an exported graph where the scheme quantizes.

    A sum is residual when one of its terms is a convolution's output that nothing else takes. The sums inside RN and
    GRN are not residual, and stay float.
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
        """Refuse nothing, because `convert` checks the result."""


def _annotate(node: Node, inputs: dict[Node, QuantizationSpec], output: QuantizationSpecBase | None) -> None:
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=dict(inputs), output_qspec=output, _annotated=True
    )


def _end_of_block(node: Node) -> Node:
    """Return the batch norm or ReLU that ends what is computed in one go with the convolution or sum `node`."""
    for following in ((BATCH_NORM,), RELUS) if node.target is CONVOLUTION else (RELUS,):
        if len(node.users) == 1 and (user := next(iter(node.users))).target in following:
            node = user
    return node
