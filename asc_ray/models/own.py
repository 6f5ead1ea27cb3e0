"""Networks of the user's own code: a function, named in the configuration, from the number of scenes to a module.

Only a configuration names code that is imported here. What was read from an artifact or a bundle never does
(`ensemble/stored.py` asks for the module's name again).
"""

import importlib
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from asc_ray.errors import UserError
from asc_ray.models.config import ModuleConfig, source_of
from asc_ray.shown import printable

_TRIED = 3  # clips that a network is tried on before it is trained
_SAME = 1e-3  # largest difference, by the largest logit, between two answers for one clip
_TORCH = str(Path(torch.__file__).parent)
_imported: dict[str, str] = {}  # by module, the source that this process has


class OwnNetwork(nn.Module):
    """A network of the user's own code, which refuses answers that are no logits."""

    def __init__(self, network: nn.Module, scenes: int, function: str) -> None:
        super().__init__()
        self.network, self.scenes, self.function = network, scenes, function

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, ...) to logits (B, scenes). Raises UserError for another answer."""
        logits = self.network(features)
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{self.function}: the network returns {type(logits).__name__}; expected a tensor of logits"
            )
        if logits.shape != (len(features), self.scenes):
            raise UserError(
                f"{self.function}: the network returns shape {tuple(logits.shape)} for an input of shape "
                f"{tuple(features.shape)}; expected logits {(len(features), self.scenes)}"
            )
        if not logits.is_floating_point():
            raise UserError(f"{self.function}: the network returns {logits.dtype}; expected logits in floating point")
        return logits


def own_network(config: ModuleConfig, scenes: int) -> OwnNetwork:
    """Import the function's module and call it. What it draws follows from torch's own generator.

    Raises UserError where the module has another source than the configuration, cannot be imported or lacks the
    function, and where the function fails or returns no module.
    """
    call = f"{config.function}({scenes})"
    if (found := source_of(config.function)) != config.source:
        raise UserError(
            f"{config.function}: the module's file has SHA-256 {found[:12]}... here, and {config.source[:12]}... was "
            "asked for; bring the same file to every node, or train a system of the new one"
        )
    if _imported.setdefault(config.module, found) != found:
        raise UserError(
            f"{config.function}: {config.module} has changed since this process has imported it; start anew"
        )
    with drawn_from(torch.initial_seed()), _settings_kept():
        try:
            function = getattr(importlib.import_module(config.module), config.function.partition(":")[2], None)
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"{config.function}: {config.module} cannot be imported: {_told(error)}") from None
        if not callable(function):
            raise UserError(f"{config.function}: the module has no such function")
        try:
            network = function(scenes)
        except Exception as error:
            raise UserError(f"{call} failed: {_told(error)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{call} returns {type(network).__name__}; expected a torch.nn.Module")
    return OwnNetwork(network, scenes, config.function)


@torch.no_grad()
def try_out(network: OwnNetwork, shape: tuple[int, ...]) -> None:
    """Ask a network, in evaluation form, for clips of noise of this shape.

    Raises UserError where it fails, answers with what is no logits or not finite, answers differently when it is asked
    again or when other clips stand beside a clip, and where it has nothing to train or nothing that can be kept.
    """
    noise = 0.1 * torch.randn(_TRIED, *shape, generator=torch.Generator().manual_seed(0))
    network.eval()

    def asked(clips: Tensor, seed: int) -> Tensor:
        with drawn_from(seed):
            try:
                return network(clips).float()
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"{network.function}: the network fails on an input of shape {tuple(clips.shape)}: {_told(error)}"
                ) from None

    first = asked(noise, 0)
    if not first.isfinite().all():
        raise UserError(f"{network.function}: the network answers noise with values that are not finite")
    most = _SAME * max(1.0, float(first.abs().max()))
    if (asked(noise, 1) - first).abs().max() > most:
        raise UserError(
            f"{network.function}: in evaluation the network answers the same clips differently when it is asked again; "
            "it may draw only where self.training holds"
        )
    if (asked(noise[:2], 0) - first[:2]).abs().max() > most:
        raise UserError(
            f"{network.function}: in evaluation the network answers a clip differently when others stand beside it; "
            "statistics of a batch may be used only where self.training holds"
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"{network.function}: the network has no parameter to train")
    if odd := [name for name, value in network.state_dict().items() if not isinstance(value, Tensor)]:
        raise UserError(f"{network.function}: the network's state holds what is no tensor: {odd[0]}")


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Seed the process's own generators, which foreign code draws from, and leave them as they were on the host."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Undo what foreign code sets for a whole process, in which other systems are trained after it."""
    threads, kind, gradients = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(kind)
        torch.set_grad_enabled(gradients)


def _told(error: Exception) -> str:
    """Return an error's class, first line and place: that in the user's own code, if it went through any."""
    frames = traceback.extract_tb(error.__traceback__)
    at = [frame for frame in frames if not frame.filename.startswith((_TORCH, "<frozen"))][-1]
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {printable(line)[:200]} ({at.filename}, line {at.lineno})"
