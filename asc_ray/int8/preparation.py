"""A network with fake quantization: how it is made, trained, calibrated and frozen."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from asc_ray.int8.scheme import BATCH_NORM, FbgemmQuantizer, RangeFollower, aten


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch copies its own deprecated tree specs.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*isinstance\\(treespec, LeafSpec\\)")
        yield


def prepare(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of the trained `model` for quantization-aware training.

    `example` (2, 1, F, T) gives the input's shape. Call the copy like any network, with any batch size; `set_training`
    replaces `train` and `eval`, which exported graphs lack. The ranges of the activations start with the first batch in
    training, so an evaluation before that is meaningless. The state dict loads into another module prepared from the
    same configuration.
    """
    with quiet():
        graph = _export(copy.deepcopy(model).train(), example)
        _drop_batch_counts(graph)
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e  # after `scheme` has silenced it

        return prepare_qat_pt2e(graph, FbgemmQuantizer())


def set_training(model: nn.Module, training: bool) -> None:
    """Switch between training and evaluation.

    In training, batch norms take the batch's statistics, and fake quantization follows the ranges. In evaluation
    neither does.
    """
    assert isinstance(model, GraphModule)
    for node in model.graph.nodes:
        if node.target is BATCH_NORM:
            node.update_arg(5, training)
    model.recompile()
    _follow(model, training)


def _follow(model: nn.Module, ranges: bool) -> None:
    for module in model.modules():
        if isinstance(module, RangeFollower):
            module.enable_observer(ranges)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Calibrate after training: the ranges become the means over all batches that run through, in evaluation form."""
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
    set_training(model, False)  # the networks have no other layer with a training form, such as dropout


FREE_BATCH = ({0: torch.export.Dim("batch")},)


def _export(model: nn.Module, example: Tensor) -> GraphModule:
    return torch.export.export(model, (example,), dynamic_shapes=FREE_BATCH).module()


def example_of(model: nn.Module) -> Tensor:
    """Return two clips of zeros in the shape that the model was exported with."""
    taken = next(node for node in graph_of(model).nodes if node.op == "placeholder")
    return torch.zeros(2, *taken.meta["val"].shape[1:])


def graph_of(model: nn.Module) -> torch.fx.Graph:
    assert isinstance(model, GraphModule)
    return model.graph


def _drop_batch_counts(model: GraphModule) -> None:
    """Remove `num_batches_tracked += 1`, which would count in evaluation too; nothing reads it."""
    for node in list(model.graph.nodes):
        if node.target is aten.add_.Tensor and node.args[0].op == "get_attr":
            assert node.args[0].target.endswith("num_batches_tracked"), node.args[0].target
            model.graph.erase_node(node)
    drop_unused(model)


def drop_unused(model: GraphModule) -> None:
    """Remove parameters and buffers that the graph does not read, such as the float weights of folded layers."""
    model.graph.eliminate_dead_code()
    used = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    for name in [*dict(model.named_parameters()), *dict(model.named_buffers())]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)
    model.recompile()
