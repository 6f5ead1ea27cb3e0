"""Search for DS-FlexiNet channel plans that meet the paper's Table II.

    python bench/channel_plans.py [--parameters 0.3] [--macs 0.6] [--top 3]
    python bench/channel_plans.py --train CLIPS [--size sm2] [--epochs 30] [--seeds 2]

The paper's Fig. 1 is lost. Tried here: three stages in the structures listed below (blocks, strides, expansions), and
in each every growing choice of even channels. Costs are in closed form, over all choices at once, and every printed one
is counted again by torchinfo. Tolerances are in percent. The structures that fit all four sizes come last in the list.

`--train` takes a clip store (`storage/clips/NAME`), trains the closest plan of every structure that fits all four
sizes, one process a core, and prints what each is worth on held-out places, the best first. The test split is not read.
"""

import argparse
import itertools
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from asc_ray.models.complexity import complexity
from asc_ray.models.ds_flexinet import DSFlexiNet, DSFlexiNetConfig, Plan, Stage
from asc_ray.models.registry import build
from asc_ray.training.dataset import PartitionConfig, Source
from asc_ray.training.systems import StudentConfig, fit_student

TABLE_II = {"sm1": (13_760, 3.88e6), "sm2": (30_690, 8.27e6), "sm3": (54_980, 14.34e6), "sm4": (126_120, 23.03e6)}
CLASSES, MELS, FRAMES = 10, 256, 64


@dataclass(frozen=True)
class Structure:
    blocks: tuple[int, int, int]
    strides: tuple[tuple[int, int], ...]  # (frequency, time) of each stage's first block
    expansions: tuple[float, ...]

    @property
    def receptive_field(self) -> int:
        """In mel bins: the stem's 7, then each depthwise convolution's 2 steps at the resolution it works in."""
        field, step = 7, 4
        for blocks, (frequency, _) in zip(self.blocks, self.strides, strict=True):
            field += 2 * step + 2 * step * frequency * (blocks - 1)
            step *= frequency
        return field

    def plan(self, channels: list[int]) -> Plan:
        stages = (
            Stage(channels=c, blocks=n, stride=stride, expansion=expansion)
            for c, n, stride, expansion in zip(channels[2:], self.blocks, self.strides, self.expansions, strict=True)
        )
        return Plan(stem=(channels[0], channels[1]), stages=tuple(stages))


# An output sees 80 to 160 of the 256 mel bins; at most six blocks; time is shortened at most eightfold.
STRUCTURES = [
    structure
    for blocks in ((1, 2, 1), (2, 2, 1), (2, 2, 2), (3, 2, 1))
    for strides in itertools.product(((2, 1), (2, 2)), ((2, 1), (2, 2)), ((1, 1), (2, 1), (2, 2)))
    for expansions in ((2.0, 2.0, 2.0), (2.0, 2.0, 3.0), (2.5, 2.5, 2.5), (3.0, 3.0, 3.0))
    if np.prod([time for _, time in strides]) <= 8
    and 80 <= (structure := Structure(blocks, strides, expansions)).receptive_field <= 160
]


def cost(structure: Structure, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and MACs, as torchinfo counts them, of plans with channels (5, plans): a batch norm has two of each a
    channel, a residual norm one parameter and no MAC."""
    parameters = macs = np.zeros(channels.shape[1])

    def conv_bn(weights, outputs, area):
        nonlocal parameters, macs
        parameters = parameters + weights + 2 * outputs
        macs = macs + weights * area + 2 * outputs

    c1, c, *stages = channels
    height, width = MELS // 4, FRAMES // 4
    conv_bn(9 * c1, c1, 4 * height * width)
    conv_bn(9 * c1 * c, c, height * width)
    rows = zip(stages, structure.blocks, structure.strides, structure.expansions, strict=True)
    for outputs, blocks, stride, expansion in rows:
        for block in range(blocks):
            f, t = stride if block == 0 else (1, 1)
            hidden = np.rint(expansion * c)
            conv_bn(c * hidden, hidden, height * width)
            shape_stays = (c == outputs) & ((f, t) == (1, 1))
            height, width = -(-height // f), -(-width // t)
            conv_bn(9 * hidden, hidden, height * width)
            conv_bn(hidden * outputs, outputs, height * width)
            conv_bn(np.where(shape_stays, 0, c * outputs), np.where(shape_stays, 0, outputs), height * width)
            c = outputs
    parameters = parameters + len(stages) - 1
    return parameters + CLASSES * (c + 1), macs + CLASSES * (c + 1)


def channel_choices() -> np.ndarray:
    """(5, plans): stem 1, stem 2 and the three stages, each at least as wide as the one before."""
    stem = [(c1, c2) for c1 in (4, 6, 8, 12, 16) for c2 in range(8, 50, 4) if c1 < c2 <= 4 * c1]
    stages = [
        (s1, s2, s3)
        for s1 in range(8, 66, 2)
        for s2 in range(s1 + 2, 2 * s1 + 2, 2)
        for s3 in range(s2 + 2, int(2.5 * s2) + 2, 2)
        if s3 <= 192
    ]
    choices = np.array([(*a, *b) for a in stem for b in stages if a[1] <= b[0] <= 2 * a[1]], dtype=np.float64)
    return choices.T


def worth(clips: Path, plan: Plan, epochs: int, seed: int) -> tuple[float, float]:
    """Accuracy and log loss on a quarter of the training places, after training on the others without teachers."""
    torch.set_num_threads(1)
    schedule = {"warm_up": 3, "ramp_down_start": epochs // 2, "ramp_down_length": max(1, epochs * 2 // 5)}
    recipe = StudentConfig.model_validate(
        {
            "model": {"name": "ds_flexinet", "size": None, "plan": plan},
            "augment": {
                "roll": 4000, "dir": {"p": 0.6}, "freq_mixstyle": {"p": 0.4, "alpha": 0.3}, "freq_mask": 48,
            },
            "optimizer": {"epochs": epochs, "batch_size": 16, "learning_rate": 3e-3, "schedule": schedule},
            "seed": seed,
        }
    )  # fmt: skip
    data = Source(clips, PartitionConfig(fusion=0.05, validation=0.25)).open()
    model = build(recipe.model, len(data.store.labels), seed)
    with tempfile.TemporaryDirectory() as folder:
        last = fit_student(model, recipe, data, None, Path(folder), lambda metrics: None)[-1]
    return last["validation_accuracy"], last["validation_log_loss"]


def rank(clips: Path, plans: dict[str, Plan], epochs: int, seeds: int) -> None:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = {head: [pool.submit(worth, clips, p, epochs, s) for s in range(seeds)] for head, p in plans.items()}
        found = {head: np.array([run.result() for run in own]) for head, own in runs.items()}
    for head in sorted(found, key=lambda head: found[head][:, 1].mean()):
        accuracy, loss = found[head].mean(axis=0)
        each = ", ".join(f"{100 * own:.1f}" for own in found[head][:, 0])
        print(f"{head}: log loss {loss:.3f}, accuracy {100 * accuracy:.1f} % ({each})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=0.3)
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--train", type=Path, metavar="CLIPS")
    parser.add_argument("--size", choices=TABLE_II, default="sm2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--match", action="append", metavar="TEXT", help="train the plans whose line has a TEXT alone")
    args = parser.parse_args()
    choices = channel_choices()
    plans: dict[str, Plan] = {}
    # Round channel numbers first (they fill vector registers), then the closest fit.
    roundness = sum((choices % step != 0).sum(0) for step in (4, 8))
    found: list[tuple[int, str]] = []
    for structure in STRUCTURES:
        parameters, macs = cost(structure, choices)
        lines, sizes = [], 0
        for size, (want_parameters, want_macs) in TABLE_II.items():
            off_parameters = 100 * (parameters / want_parameters - 1)
            off_macs = 100 * (macs / want_macs - 1)
            fits = np.flatnonzero((abs(off_parameters) <= args.parameters) & (abs(off_macs) <= args.macs))
            fits = fits[np.lexsort((abs(off_parameters[fits]) + abs(off_macs[fits]), roundness[fits]))]
            sizes += bool(fits.size)
            if size == args.size and fits.size:
                closest = structure.plan([int(c) for c in choices[:, fits[0]]])
            for index in fits[: args.top]:
                channels = [int(c) for c in choices[:, index]]
                counted = complexity(DSFlexiNet(DSFlexiNetConfig(size=None, plan=structure.plan(channels)), CLASSES))
                assert (counted.parameters, counted.macs) == (parameters[index], macs[index]), (structure, channels)
                lines.append(f"  {size} {channels} {off_parameters[index]:+.2f} % {off_macs[index]:+.2f} %")
        head = f"{structure.blocks} {structure.strides} {structure.expansions} field {structure.receptive_field}"
        found.append((sizes, "\n".join([f"{head}: {sizes} of 4 sizes", *lines])))
        if sizes == len(TABLE_II):
            plans[f"{head} {[closest.stem, *(stage.channels for stage in closest.stages)]}"] = closest
    for _, text in sorted(found, key=lambda item: item[0]):
        print(text)
    if args.train:
        some = {head: plan for head, plan in plans.items() if any(text in head for text in args.match or [""])}
        rank(args.train, some, args.epochs, args.seeds)


if __name__ == "__main__":
    main()
