"""Every kind of step on a device that is none (bench/rehearsal.py): nothing in it waits for the host, or is left there.

The device is registered with torch for a whole process, so the trainings run in one of their own.
"""

import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from tiny import CLIPS, KINDS, NETWORKS, PASST, SHORT, trained

from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import CLIP_SAMPLES
from asc_ray.models.passt import Passt
from asc_ray.models.registry import build, folded
from asc_ray.training import loop
from asc_ray.training.config import Recipe
from asc_ray.training.validation import predict_all


def rehearsed(kind: str) -> tuple[list[int], float]:
    """How many kernels each step started on the device, and how far the losses are from the CPU's, relatively."""
    sys.path.insert(0, str(ROOT / "bench"))
    from rehearsal import Rehearsal

    torch.set_num_threads(1)
    mode = Rehearsal()  # before anything is trained: autograd counts the devices once
    on_cpu = trained(kind, torch.device("cpu"))
    compute, kernels = loop.Trainer._compute, []

    def strictly(self: Any, *arguments: torch.Tensor) -> torch.Tensor:
        if not kernels:  # the first step lays down tables
            kernels.append(0)
            return compute(self, *arguments)
        with mode.strict():
            result = compute(self, *arguments)
        kernels.append(len(mode.kernels))
        return result

    with (
        mode,
        patch.object(loop.Trainer, "_compute", strictly),
        patch.object(loop, "training_device", lambda gpus: mode.device),
    ):
        there = trained(kind, mode.device)
    return kernels, max(abs(a - b) / abs(b) for a, b in zip(there, on_cpu, strict=True))


def ensemble() -> float:
    """The largest difference of an inference of several networks on the device to that on the CPU."""
    sys.path.insert(0, str(ROOT / "bench"))
    from gpu import SCENES, noise
    from rehearsal import Rehearsal

    recipe = Recipe.model_validate({"model": PASST, "frontend": SHORT})
    with tempfile.TemporaryDirectory() as folder:
        data = noise(Path(folder), CLIPS)
        rows = data.parts["train"]

        def predicted(device: torch.device) -> torch.Tensor:
            models = [folded(build(recipe.model, SCENES, seed)).to(device) for seed in range(2)]
            return predict_all(models, LogMel(recipe.frontend).to(device), data.store, rows, device, 8)

        expected = predicted(torch.device("cpu"))
        with Rehearsal() as mode:
            found = predicted(mode.device)
    return float((found - expected).abs().max())


def misuse(name: str) -> str:
    """What is said where a step does what it must not."""
    sys.path.insert(0, str(ROOT / "bench"))
    from rehearsal import HostWaits, Rehearsal

    with Rehearsal() as mode:
        there = torch.arange(4.0).to(mode.device)
        try:
            with mode.strict():
                {
                    "item": lambda: float(there.sum()),
                    "mask": lambda: there[there > 1],
                    "left": lambda: there + torch.ones(4),
                    "fetched": there.cpu,
                    "copied": lambda: torch.empty(4).copy_(there),
                    "shape": there.nonzero,
                }[name]()
        except HostWaits as error:
            return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_host_and_all_compute_what_the_cpu_does(process, kind):
    kernels, difference = process.submit(rehearsed, kind).result()
    assert len(kernels) == 6, "two epochs of three steps"
    assert min(kernels[1:]) > 50
    assert difference < (3e-2 if "bf16" in kind else 5e-3 if "int8" in kind else 2e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_compiles_in_one_piece(name):
    """Where a graph breaks, the host looks at something."""
    recipe = Recipe.model_validate({"frontend": SHORT} | NETWORKS[name])
    model = build(recipe.model, scenes=4)
    frames = recipe.frontend.frames(CLIP_SAMPLES)
    choices = model.choices(frames, torch.Generator().manual_seed(0)) if isinstance(model, Passt) else ()
    mel = torch.randn(2, 1, recipe.frontend.mels, frames)
    whole = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert whole(mel, *choices).shape == (2, 4)


def test_an_ensemble_answers_there_as_on_the_cpu(process):
    assert process.submit(ensemble).result() < 1e-5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("item", "needs a value"),
        ("mask", "needs a value"),
        ("shape", "needs a value"),
        ("left", "left on the host"),
        ("fetched", "to the host"),
        ("copied", "to the host"),
    ],
)
def test_the_rehearsal_sees_what_it_is_to_see(process, name, said):
    assert said in process.submit(misuse, name).result()
