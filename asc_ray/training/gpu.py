"""What a training does only on a GPU: its arithmetic, and steps that are recorded and replayed.

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
    """Return where to compute with so many `gpus`, or with a part of one: with 0 on the CPU, whatever the machine has.

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
    """Return one stream for all trainings of a process, because freed memory is reused only on the same stream."""
    return torch.cuda.Stream(device)


@contextmanager
def on_gpu(device: torch.device, tf32: bool = False, deterministic: bool = False) -> Iterator[None]:
    """Set up a GPU for a training or an inference; do nothing for a CPU.

    The work runs in a stream that is not the default one, because recording needs that. float32 is rounded to TF32 only
    with `tf32` (cuDNN does so by default). With `deterministic`, all algorithms give the same bits every time.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    strict = torch.are_deterministic_algorithms_enabled()
    # Deterministic cuBLAS needs this. torch reads it once a process, so the first training sets it for later ones.
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
    """A function of tensors on a GPU: the first call runs it, the second records it, and later ones replay it.

    The function must not read values from the GPU, or depend on anything but its arguments that changes between calls.
    A call with other shapes, such as an epoch's last batch, runs it plainly. Use it within `on_gpu`.
    """

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        # The function is not kept: a method would keep its training alive, and that training's GPU memory.
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
