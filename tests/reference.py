"""What the published systems compute: weights and sounds made from names and seeds, and digests of the outputs.

The published outputs themselves are no part of the project. A digest of an array is a handful of random projections of
it: two arrays whose digests agree are equal to about the tolerance of the digests. Where the outputs lie beside the
checkout (REFERENCE), `python tests/renew.py` makes the digests, and the tests compare with the outputs, too.
"""

import hashlib
import importlib.util
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.config.composition import PRESETS, network_preset
from asc_ray.models.config import CPMobileConfig, CPResNetConfig, PasstConfig
from asc_ray.models.registry import build
from asc_ray.training.config import Recipe

REFERENCE = ROOT.parent / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no published outputs beside the checkout")
GOLDEN = ROOT / "tests" / "golden"
RENEW = "if this was meant, renew the golden files with `make golden` and say why in the changelog"

NETWORKS = {"passt": PasstConfig(), "cp_resnet": CPResNetConfig(), "cp_mobile": CPMobileConfig()}
FRONT_ENDS = {
    "passt": FrontendConfig(n_fft=1024, window=800, hop=320, mels=128),
    "cp_resnet": FrontendConfig(hop=750),
    "cp_mobile": FrontendConfig(),
}
STUDENT = {"name": "ds_flexinet", "size": "sm1"}
OWN_NETWORKS: dict[str, dict[str, Any]] = {
    **{file.stem: network_preset(file.stem) for file in sorted((PRESETS / "students").glob("*.yaml"))},
    **{kind: {"model": STUDENT | {"normalization": {"kind": kind}}} for kind in ("rn_frequency", "in", "bn", "none")},
}
SOUNDS = {"0_2_1": (0, 2, 1), "1_1_1": (1, 1, 1)}  # the published outputs' names: seed, clips, seconds


def waves(seed: int, clips: int, seconds: int) -> Tensor:
    """(clips, 32000 * seconds) float32: faint white noise, and five tones of random level, pitch and phase."""
    rng = np.random.default_rng(seed)
    time = np.arange(32_000 * seconds) / 32_000
    sounds = 0.05 * rng.standard_normal((clips, len(time)))
    for clip in range(clips):
        for _ in range(5):
            level, hertz, phase = rng.uniform(0.02, 0.2), rng.uniform(60, 9000), rng.uniform(0, 6.28)
            sounds[clip] += level * np.sin(2 * np.pi * hertz * time + phase)
    return torch.from_numpy(sounds).float()


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, each weight and buffer normally distributed by a generator of its own name."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape), np.float32)
        new, kind = torch.from_numpy(normal), name.split(".")[-1]
        if kind == "running_var":
            new = 1 + 0.2 * new.abs()
        elif kind == "running_mean":
            new = 0.1 * new
        elif new.ndim == 1 and kind == "weight":  # of a normalization
            new = 1 + 0.1 * new
        elif new.ndim > 1:
            new = new / max(1, new[0].numel()) ** 0.5
        else:
            new = 0.05 * new
        value.copy_(new)
    return model.eval()


def published(name: str) -> nn.Module:
    """The network on the meta device: names and shapes without 340 MB of weights."""
    with torch.device("meta"):
        return build(NETWORKS[name], scenes=10)


def digest(values: Any, numbers: int) -> list[list[float]]:
    """(N, ...) -> (N, numbers): the product of each item with `numbers` random unit vectors."""
    flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    vectors = np.random.default_rng(flat.shape[1]).standard_normal((flat.shape[1], numbers))
    vectors /= np.linalg.norm(vectors, axis=0)
    return [[float(f"{value:.7g}") for value in row] for row in flat @ vectors]


def mel_digest(mel: Any) -> list[list[float]]:
    return digest(mel, 16)


def logits_digest(logits: Any) -> list[list[float]]:
    return digest(logits, 5)


def names_digest(shapes: dict[str, Any]) -> str:
    """Of names and shapes of a state dict: the SHA-256 of the sorted lines "name 1x2x3"."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def published_outputs(system: str, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """The `mel` (N, mels, frames) or `logits` (N, 10) of each sound, by the sound's name."""
    for name, output in np.load(REFERENCE / f"{system}.npz").items():
        if name.startswith(f"{kind}_"):
            yield name.removeprefix(f"{kind}_"), output


def published_shapes(system: str) -> dict[str, list[int]]:
    return json.loads((REFERENCE / f"{system}_state_dict.json").read_text())


def published_digests() -> dict[str, Any]:
    """What tests/golden/published.json holds of the published outputs; raises where our inputs are not theirs."""
    spec = importlib.util.spec_from_file_location("fill", REFERENCE / "fill.py")
    assert spec
    assert spec.loader
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    for sound in SOUNDS.values():
        assert torch.equal(waves(*sound), fill.wave(*sound))
    for name in NETWORKS:
        theirs, ours = (make(published(name).to_empty(device="cpu")).state_dict() for make in (fill.fill_, filled))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items() if value.is_floating_point()), name
    return {
        name: {
            "names": names_digest(published_shapes(name)),
            "mel": {sound: mel_digest(mel) for sound, mel in published_outputs(name, "mel")},
            "logits": {sound: logits_digest(logits) for sound, logits in published_outputs(name, "logits")},
        }
        for name in NETWORKS
    }


def own_outputs() -> dict[str, Any]:
    """What tests/golden/own.json holds: logits of our own networks, each behind its own front end, and the responses
    of the built-in bank."""
    sound, logits = waves(0, 2, 1), {}
    for name, settings in OWN_NETWORKS.items():
        recipe = Recipe.model_validate(settings)
        with torch.no_grad():
            found = filled(build(recipe.model, 10))(LogMel(recipe.frontend)(sound[:, None]))
        logits[name] = [[float(f"{value:.7g}") for value in row] for row in found.tolist()]
    return {"logits": logits, "responses": digest(ImpulseBank.load(None).responses, 3)}
