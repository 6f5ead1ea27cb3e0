"""From a network that was trained for int8 to an int8 model."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from asc_ray.int8.preparation import drop_unused, graph_of, quiet, set_training
from asc_ray.int8.scheme import (
    BATCH_NORM,
    CONVOLUTION,
    DEQUANTIZE,
    LAYERS,
    MAX_POOL,
    POOLS,
    QUANTIZE,
    RELUS,
    SUMS,
    WEIGHT,
    aten,
)

MOST_STEPS = 2**30  # largest bias, in steps of its grid; within int32


@torch.no_grad()
def round_biases(model: nn.Module) -> None:
    """Round the biases of a trained, prepared `model` as engines do: to int32 in steps of input x weight scale.

    Such a step is at most a hundredth of the output's step. It still makes one value in a thousand round the other way,
    and more from layer to layer: without this an engine's logits differ by some hundredths from torch's.
    """
    assert isinstance(model, GraphModule)
    modules: dict[Any, Any] = dict(model.named_modules(remove_duplicate=False))
    norms: dict[Any, tuple[Tensor, Tensor]] = {}  # by convolution: its batch norm's shift, and what is taken from that
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
    """Raise each channel's step to `least` or more.

    A channel whose weights are tiny beside its bias would otherwise need a bias that int32 cannot hold.
    """
    narrow = weight.scale < least
    if narrow.any():
        weight.scale[narrow] = least[narrow].float()
        weight.activation_post_process.max_val[narrow] = weight.scale[narrow] * (WEIGHT.quant_max + 0.5)


def convert(model: nn.Module) -> nn.Module:
    """Return the int8 model of a prepared and trained `model`, which is not changed; on the CPU, with rounded biases.

    Raises RuntimeError if a batch norm was not folded or a convolution or linear layer has weights other than int8.
    """
    with quiet():
        folded = copy.deepcopy(model).cpu()
        assert isinstance(folded, GraphModule)
        set_training(folded, False)
        round_biases(folded)
        _fold_batch_norms(folded)
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e  # after `scheme` has silenced it

        int8 = convert_pt2e(folded, fold_quantize=True)
        drop_unused(int8)
    _check(int8)
    for module in int8.modules():
        module.training = False  # an exported graph refuses eval()
    for zero_point in int8.buffers():
        if zero_point.dtype == torch.int64:
            zero_point.data = zero_point.int()
    return int8.requires_grad_(False)


def operators(model: nn.Module) -> list[tuple[str, str, str]]:
    """Return (name, operator, "int8" | "float32") of all that a converted model computes, in order.

    An operator is int8 if it has an 8-bit kernel and all its inputs were 8-bit before: an engine that joins it with the
    quantization and dequantization around it needs no float there.
    """
    int8: set[Node] = set()
    rows = []
    for node in graph_of(model).nodes:
        if node.op != "call_function" or node.target in (*QUANTIZE, *DEQUANTIZE):
            continue
        has_kernel = node.target in (*LAYERS, *SUMS, *RELUS, *POOLS, MAX_POOL, aten.flatten.using_ints)
        computed = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if has_kernel and all(source.target in DEQUANTIZE or source in int8 for source in computed):
            int8.add(node)
        rows.append((node.name, str(node.target), "int8" if node in int8 else "float32"))
    return rows


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a converted model's tensors: int8 weights, float32 scales and biases, integer zero points."""
    count: Counter[str] = Counter()
    for tensor in model.state_dict().values():
        count[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(count)


@torch.no_grad()
def _fold_batch_norms(model: GraphModule) -> None:
    """Remove every batch norm from a prepared graph: in evaluation it is x * scale + shift.

    In training torchao multiplies a convolution's weight by the scale before rounding it and divides the output by it
    again. So the product is the folded weight, and the shift is its bias. (torchao's own folding does the same in 15
    seconds, because it traces 96 patterns to search for.) A batch norm between the stages becomes a product and a sum
    in float.
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
        elif x.op in ("call_module", "placeholder"):  # another block's rounded output, or the mels
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
    """Return (convolution, scale, moved): in evaluation the batch norm is scale x + shift - moved.

    x is the convolution's output before its bias, in torchao's form for training. With another input the convolution is
    None.
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
