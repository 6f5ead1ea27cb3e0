"""Measure the C form of four networks, as docs/microcontroller.md shows it.

    python bench/microcontroller.py CLIPS [--models sm1 sm2 sm4 cp_mobile] [--epochs 1] [--emulated 100]

CLIPS is a finished clip store, such as runs/demo/clips/<key>. Each network is trained on its training split with labels
alone, for some epochs in float32 and one with fake quantization: weights and ranges are those of a trained network, and
accuracy does not matter here. Its bundle's C form is compared with onnxruntime on the test split on this computer, and
on `--emulated` of its clips on the emulated Cortex-M4.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from asc_ray.artifacts import Artifact
from asc_ray.audio.frontend import LogMel
from asc_ray.config.composition import checked, network_preset
from asc_ray.data.clips import ClipStore, open_clips
from asc_ray.embedded.figures import CLOCKS
from asc_ray.embedded.folder import write_c
from asc_ray.embedded.generate import generate
from asc_ray.embedded.program import emulated
from asc_ray.int8 import conversion, preparation
from asc_ray.int8.bundle import write_bundle
from asc_ray.int8.onnx_form import export_onnx
from asc_ray.models.registry import build
from asc_ray.runtime import Bundle
from asc_ray.training.config import Recipe

BATCH = 32
HEAD = (
    "network", "int8 weights", "flash, bytes", "arena, bytes", "RAM, bytes", "instructions", "front end",
    f"ms at {', '.join(map(str, CLOCKS))} MHz", "other scene", "equal to the bit", "other scene, emulated",
)  # fmt: skip


def train(model: nn.Module, mels: torch.Tensor, scene: torch.Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for epoch in range(epochs):
        order = torch.randperm(len(mels), generator=torch.Generator().manual_seed(epoch))
        for rows in order[: len(mels) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(mels[rows]), scene[rows]).backward()
            optimizer.step()


def bundle_of(name: str, folder: Path, store: ClipStore, epochs: int) -> Path:
    """Train the network of that preset, and write its bundle into a new folder."""
    recipe = checked(Recipe, network_preset(name), name)
    rows = np.flatnonzero(store.split == "train")
    log_mel, parts = LogMel(recipe.frontend), np.array_split(rows, -(-len(rows) // BATCH))
    mels = torch.cat([log_mel(torch.from_numpy(store.pcm(own)).float() / 32768) for own in parts])[:, None]
    scene = torch.from_numpy(store.scene[rows].copy()).long()
    torch.manual_seed(0)
    model = build(recipe.model, len(store.labels)).train()
    train(model, mels, scene, epochs, rate=2e-3)
    fake = preparation.prepare(model, mels[:2])
    preparation.set_training(fake, True)
    train(fake, mels, scene, 1, rate=2e-4)
    preparation.freeze(fake)
    artifact = Artifact(folder, "int8", name, "0" * 16, {}, {})
    export_onnx(conversion.convert(fake), artifact.open_partial() / "model.onnx")
    artifact.finish({})
    bundle = folder / "bundle"
    bundle.mkdir()
    write_bundle(bundle, artifact.path, store.labels, recipe.frontend)
    return bundle


def row(name: str, folder: Path, store: ClipStore, epochs: int, count: int) -> list[str]:
    """Return a row of the table."""
    bundle = bundle_of(name, folder, store, epochs)
    test = np.flatnonzero(store.split == "test")
    batches = [store.pcm(rows) for rows in np.array_split(test, -(-len(test) // BATCH))]
    logits = np.concatenate([Bundle(bundle).logits(batch) for batch in batches])
    form = write_c(bundle, folder / "c", batches, logits)
    own = form.figures
    if own is None:
        raise SystemExit(
            "arm-none-eabi-gcc or qemu-system-arm is not here; docs/microcontroller.md says how to install them"
        )
    on_core, _ = emulated(generate(bundle).files, store.pcm(test[:: -(-len(test) // count)]), len(store.labels))
    total = own.front_end + own.network
    return [
        name,
        f"{form.weights:,}",
        f"{own.flash:,}",
        f"{form.arena:,}",
        f"{own.ram + own.stack + 2 * form.samples:,}",
        f"{total / 1e6:.1f} M",
        f"{100 * own.front_end / total:.1f} %",
        ", ".join(f"{total / clock / 1e3:.0f}" for clock in CLOCKS),
        f"{form.differ} of {form.clips}",
        f"{form.equal}",
        f"{(on_core.argmax(1) != logits[:: -(-len(test) // count)].argmax(1)).sum()} of {len(on_core)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--models", nargs="+", default=["sm1", "sm2", "sm4", "cp_mobile"])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--emulated", type=int, default=100)
    given = parser.parse_args()
    store = open_clips(given.clips)
    for cells in (HEAD, ["---"] * len(HEAD)):
        print(f"| {' | '.join(cells)} |", flush=True)
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(row(name, Path(folder), store, given.epochs, given.emulated))} |", flush=True)


if __name__ == "__main__":
    main()
