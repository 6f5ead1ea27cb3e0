"""The inference of a DCASE 2025 task 1 submission: what its four functions do.

`asc-ray export --target dcase2025` copies this module, and what it imports, into the package that it writes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile as sf
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.resample import resample
from asc_ray.models.config import ModelConfig
from asc_ray.models.registry import build, folded

_BATCH = 64


class CompactConv2d(nn.Conv2d):
    """A convolution with its batch norm folded in; an int8 weight has steps of one `scale` an output channel.

    The bias is called `shift`, because torchinfo takes a convolution's `bias` for a multiply-accumulate a position, but
    not that of a batch norm, with which networks are counted.
    """

    scale: Tensor
    shift: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, _unrounded(self.weight, x, self.scale), None)
        return y if self.shift is None else y + self.shift[:, None, None]


class CompactLinear(nn.Linear):
    """A linear layer; an int8 weight has steps of one `scale` an output channel."""

    scale: Tensor
    shift: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _unrounded(self.weight, x, self.scale), self.shift)


def _unrounded(weight: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return weight.to(x.dtype) * scale if weight.dtype == torch.int8 else weight


class Submission(nn.Module):
    """The general student, and one for each known device, in float16; with `int8` the weights of its layers are int8.

    `about` names labels, network, front end, precision and devices. The networks' weights are zero until they are
    loaded.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.labels: list[str] = list(about["labels"])
        self.devices: dict[str, int] = {name: number for number, name in enumerate(about["devices"])}
        self.frontend = LogMel(FrontendConfig.model_validate(about["frontend"]))
        model: Any = TypeAdapter(ModelConfig).validate_python(about["model"])
        networks = [compact(build(model, len(self.labels)), about["int8"]) for _ in range(1 + len(self.devices))]
        self.networks = nn.ModuleList(networks)  # numbered, because a device's name need not be a module's

    def for_device(self, device: str) -> nn.Module:
        """Return the device's own network, or for an unknown device the general one."""
        return self.networks[1 + self.devices[device]] if device in self.devices else self.networks[0]

    def mels(self, wave: Tensor) -> Tensor:
        """Turn waves (B, T) at the front end's rate into the networks' input (B, 1, mels, frames) float16."""
        return self.frontend(wave[:, None]).half()


def compact(network: nn.Module, int8: bool) -> nn.Module:
    """Return the network in evaluation form, batch norms folded, in float16; with `int8` with rounded weights."""
    network = folded(network)
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, bias = layer.weight.detach(), layer.bias
            peak = weight.abs().flatten(1).amax(1).clamp(min=1e-5)  # the least whose step float16 holds
            scale = (peak / 127).half().reshape(-1, *[1] * (weight.ndim - 1))
            if int8:
                steps = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
                layer.weight = nn.Parameter(steps, requires_grad=False)
            layer.register_buffer("scale", scale)
            layer.register_parameter("bias", None)
            layer.register_parameter("shift", None if bias is None else nn.Parameter(bias, requires_grad=False))
            layer.__class__ = CompactConv2d if isinstance(layer, nn.Conv2d) else CompactLinear
    return network.half()


def load_model(file: str | Path) -> Submission:
    """Return the submission's networks from its checkpoint."""
    stored = torch.load(file, map_location="cpu", weights_only=True)
    model = Submission(stored["about"])
    model.load_state_dict(stored["state_dict"])
    return model.eval()


def load_inputs(file_paths: Sequence[str | Path], device_ids: Sequence[str], model: Submission) -> list[Tensor]:
    """Return the log-mel (1, 1, mels, frames) float16 of each recording, of one second each; the device changes none.

    Raises ValueError where there are not as many devices as files.
    """
    if len(file_paths) != len(device_ids):
        raise ValueError(f"{len(file_paths)} files and {len(device_ids)} device ids; expected as many")
    return [model.mels(_wave(Path(file), model.frontend.config.sample_rate)) for file in file_paths]


@torch.no_grad()
def predict(file_paths: Sequence[str | Path], device_ids: Sequence[str], model: Submission) -> list[Tensor]:
    """Return the logits (scenes,) float32 of each recording, by the network of its device."""
    inputs = load_inputs(file_paths, device_ids, model)
    return list(logits(torch.cat(inputs), device_ids, model)) if inputs else []


@torch.no_grad()
def logits(mels: Tensor, device_ids: Sequence[str], model: Submission) -> Tensor:
    """Return the logits (N, scenes) float32 of inputs (N, 1, mels, frames) recorded with `device_ids`."""
    found = torch.empty(len(mels), len(model.labels))
    for device in dict.fromkeys(device_ids):
        rows = torch.tensor([row for row, own in enumerate(device_ids) if own == device])
        for some in rows.split(_BATCH):
            found[some] = model.for_device(device)(mels[some]).float()
    return found


def table(names: Sequence[str], found: Sequence[Tensor], labels: Sequence[str]) -> list[list[str]]:
    """Return the lines of the challenge's output.csv, the first with the columns: file, scene, and probabilities."""
    lines = [["filename", "scene_label", *labels]]
    for name, own in zip(names, found, strict=True):
        probabilities = torch.softmax(own.double(), dim=0).tolist()
        lines.append([name, labels[int(own.argmax())], *(f"{value:.6f}" for value in probabilities)])
    return lines


def _wave(file: Path, rate: int) -> Tensor:
    """Return a recording of a second (1, rate) as asc-ray stores it: mono, resampled, in steps of 16 bits.

    Raises ValueError where it is more than a tenth shorter or longer.
    """
    samples, own_rate = sf.read(file, dtype="float32", always_2d=True)
    if not 0.9 <= len(samples) / own_rate <= 1.1:
        raise ValueError(f"{file}: {len(samples) / own_rate:.2f} s long; one second is expected")
    wave = torch.from_numpy(samples).mean(1)[None]
    if own_rate != rate:
        wave = resample(wave, own_rate, rate)
    wave = F.pad(wave, (0, max(0, rate - wave.shape[1])))[:, :rate]
    return (wave * 32768).round().clamp(-32768, 32767) / 32768
