"""What a training does on a GPU and nowhere else: its arithmetic, and steps that are recorded and replayed.

A step of a student is some three hundred operators of microseconds each, and starting them one by one from Python takes
longer than computing them. So they are recorded once as a CUDA graph, which is then started as a whole.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from asc_ray.errors import UserError


def training_device(gpus: float) -> torch.device:
    """Where to compute with so many GPUs, or such a part of one: without any on the CPU, whatever the machine has.

    Raises UserError where a GPU was asked for and torch sees none.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"gpus: {gpus:g} was asked for, and torch {torch.__version__} sees no GPU here; install a CUDA build of "
            "torch on every node, or ask for gpus: 0"
        )
    return torch.device("cuda")


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all trainings of a process: memory that one of them freed is another's only on the same stream."""
    return torch.cuda.Stream(device)


@contextmanager
def on_gpu(device: torch.device, tf32: bool = False, deterministic: bool = False) -> Iterator[None]:
    """What a training or an inference runs in: a stream that is not the default one, as recording asks for; float32
    that is rounded to TF32 only where that is asked for (cuDNN does it by itself); and where asked for, only algorithms
    that give the same bits every time. On a CPU it is nothing."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    strict = torch.are_deterministic_algorithms_enabled()
    # cuBLAS asks for it to be deterministic, and torch looks once a process: a training before this one may not be.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if deterministic:
            torch.use_deterministic_algorithms(True)
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.use_deterministic_algorithms(strict)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        torch.cuda.current_stream().wait_stream(stream)


class Replayed:
    """A function of tensors of unchanging shapes on a GPU: called plainly first, recorded by the second call.

    The function must not read from the device, or depend on anything but its arguments that changes from call to call.
    A call with other shapes, as that of an epoch's last batch, is a plain one. Used within `on_gpu`.
    """

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        # The function is not kept: a method would keep its training alive, and with it what that has on the card.
        if [value.shape for value in inputs] != [value.shape for value in self._inputs]:
            if self._graph is None:
                self._inputs = inputs
            return function(*inputs)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._output = function(*self._inputs)
            self._graph = graph
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._output.clone()
