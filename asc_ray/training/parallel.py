"""Data-parallel training: the processes of a torch.distributed group together take the steps of one process.

Every rank reads its own clips, gathers the whole batch for augmentation (mixup and Freq-MixStyle take a partner from
anywhere in it), and runs the network on its own share. Gradients and batch-norm statistics are those of the whole
batch. Without a group there is one rank, and the functions here change nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from asc_ray.errors import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(piece: Tensor, count: int) -> Tensor:
    """Return on every rank the batch of `count` clips; the `piece` of rank r has the clips r, r + world, ..."""
    ranks = world()
    if ranks == 1:
        return piece
    size = -(-count // ranks)
    padded = piece.new_zeros(size, *piece.shape[1:])
    padded[: len(piece)] = piece
    pieces = [torch.empty_like(padded) for _ in range(ranks)]
    # As bytes, because no backend knows int16.
    dist.all_gather([one.view(torch.uint8) for one in pieces], padded.view(torch.uint8))
    return torch.stack(pieces, dim=1).flatten(0, 1)[:count]


def summed(values: Tensor) -> Tensor:
    """Replace `values` on every rank by their sum over all ranks, without a gradient, and return them."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def agreed(value: Any) -> Any:
    """Return the first rank's value on every rank; it must be picklable."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def distributed(model: nn.Module) -> nn.Module:
    """Return the model in DistributedDataParallel, its batch norms over the whole batch; for one rank, the model.

    Raises UserError for batch norms that several workers cannot share on CPUs.
    """
    if world() == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = GlobalBatchNorm2d  # this keeps weights, statistics and names
            elif isinstance(module, _BatchNorm) and not isinstance(module, GlobalBatchNorm2d):
                raise UserError(
                    f"the network has a {type(module).__name__}, whose statistics workers on CPUs do not share; "
                    "use teachers.resources.workers: 1, GPUs, or BatchNorm2d"
                )
    return nn.parallel.DistributedDataParallel(model)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return summed(gradients[0].clone())


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """SyncBatchNorm for the CPU, where torch has none: in training the statistics are those of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = _Sum.apply(torch.cat([values.sum((0, 2, 3)), values.new_full((1,), values[:, 0].numel())]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean[:, None, None]
        variance = _Sum.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
