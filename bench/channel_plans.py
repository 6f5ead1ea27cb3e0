"""Search for DS-FlexiNet channel plans that meet the paper's Table II.

    python bench/channel_plans.py [--parameters 0.3] [--macs 0.6] [--top 3]
    python bench/channel_plans.py --train CLIPS [CLIPS ...] [--size sm4] [--epochs 30] [--seeds 2] [--match TEXT]

The paper's Fig. 1 is lost. This program tries the structures listed below (three stages with numbers of blocks, max
pools before a stage, and expansions), each with every growing choice of even channels. Costs are in closed form, for
all choices at once, and torchinfo counts every printed plan again. Tolerances are in percent. The structures that fit
all four sizes come last in the list.

`--train` takes clip stores (`storage/clips/NAME-KEY`) of other recordings and devices than those that results are
reported on. It trains the closest plan of each structure that fits all four sizes, without teachers, one process a
core, and prints the plans' scores on the stores' test splits, the best first.
"""

import argparse
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from recipes import trained

from asc_ray.config.composition import PRESETS, preset
from asc_ray.data.config import PartitionConfig
from asc_ray.models.complexity import complexity
from asc_ray.models.config import ChannelPlan, DSFlexiNetConfig, Stage
from asc_ray.models.ds_flexinet import DSFlexiNet
from asc_ray.students.config import StudentConfig
from asc_ray.students.targets import student_clips
from asc_ray.training.dataset import Source

TABLE_II = {"sm1": (13_760, 3.88e6), "sm2": (30_690, 8.27e6), "sm3": (54_980, 14.34e6), "sm4": (126_120, 23.03e6)}
CLASSES, MELS, FRAMES = 10, 256, 64


@dataclass(frozen=True)
class Structure:
    blocks: tuple[int, int, int]
    pools: tuple[tuple[int, int], ...]  # (frequency, time) before each stage's first block
    expansions: tuple[float, ...]

    def plan(self, channels: list[int]) -> ChannelPlan:
        stages = (
            Stage(channels=c, blocks=n, pool=pool, expansion=expansion)
            for c, n, pool, expansion in zip(channels[2:], self.blocks, self.pools, self.expansions, strict=True)
        )
        return ChannelPlan(stem=(channels[0], channels[1]), stages=tuple(stages))


STRUCTURES = [
    Structure(*shape)
    for shape in itertools.product(
        ((1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2)),
        itertools.product(((1, 1), (2, 1), (2, 2)), ((2, 1), (2, 2)), ((2, 1), (2, 2))),
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (2.0, 2.0, 3.0), (3.0, 3.0, 3.0)),
    )
]


def cost(structure: Structure, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the parameters and MACs, as torchinfo counts them, of plans with channels (5, plans).

    A batch norm has two of each a channel, a residual norm one parameter and no MAC.
    """
    parameters = macs = np.zeros(channels.shape[1])

    def conv_bn(weights, outputs, area):
        nonlocal parameters, macs
        parameters = parameters + weights + 2 * outputs
        macs = macs + weights * area + 2 * outputs

    c1, c, *stages = channels
    height, width = MELS // 4, FRAMES // 4
    conv_bn(9 * c1, c1, 4 * height * width)
    conv_bn(9 * c1 * c, c, height * width)
    rows = zip(stages, structure.blocks, structure.pools, structure.expansions, strict=True)
    for outputs, blocks, (f, t), expansion in rows:
        height, width = height // f, width // t
        for _ in range(blocks):
            hidden, stays = np.rint(expansion * c), c == outputs
            conv_bn(c * hidden, hidden, height * width)
            conv_bn(9 * hidden, hidden, height * width)
            conv_bn(hidden * outputs, outputs, height * width)
            conv_bn(np.where(stays, 0, c * outputs), np.where(stays, 0, outputs), height * width)
            c = outputs
    parameters = parameters + len(stages) - 1
    return parameters + CLASSES * (c + 1), macs + CLASSES * (c + 1)


def channel_choices() -> np.ndarray:
    """Return channels (5, plans) of two stem convolutions and three stages, each at least as wide as the one before."""
    stem = [(c1, c2) for c1 in (4, 6, 8, 12, 16, 24) for c2 in range(8, 66, 4) if c1 < c2 <= 4 * c1]
    stages = [
        (s1, s2, s3)
        for s1 in range(8, 90, 2)
        for s2 in range(s1 + 2, 2 * s1 + 2, 2)
        for s3 in range(s2 + 2, min(int(2.5 * s2), 200) + 2, 2)
    ]
    choices = np.array([(*a, *b) for a in stem for b in stages if a[1] <= b[0] <= 2 * a[1]], dtype=np.float64)
    return choices.T


def worth(clips: Path, plan: ChannelPlan, epochs: int, seed: int) -> tuple[float, float, float]:
    """Train without teachers; return log loss, accuracy and accuracy on unseen devices on the store's test split."""
    torch.set_num_threads(1)
    raw = preset("recipe", "short", ("recipes",), PRESETS)
    del raw["distillation"]
    recipe = StudentConfig.model_validate(
        {**raw, "model": {"name": "ds_flexinet", "size": None, "plan": plan}, "seed": seed}
    )
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.scaled_to(epochs)})
    data = Source(clips, PartitionConfig(fusion=0.08, validation=0.04)).open(test=True)
    scores = trained(data, recipe, student_clips(data))[0][1]
    return scores.log_loss, 100 * scores.accuracy, 100 * scores.accuracies()["unseen"]


def rank(stores: list[Path], plans: dict[str, ChannelPlan], epochs: int, seeds: int) -> None:
    runs = list(itertools.product(stores, range(seeds)))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        tasks = {head: [pool.submit(worth, clips, p, epochs, s) for clips, s in runs] for head, p in plans.items()}
        found = {head: np.array([task.result() for task in own]) for head, own in tasks.items()}
    for head in sorted(found, key=lambda head: found[head][:, 0].mean()):
        loss, accuracy, unseen = found[head].mean(axis=0)
        each = ", ".join(f"{own:.1f}" for own in found[head][:, 2])
        print(f"{head}: log loss {loss:.3f}, {accuracy:.1f} %, unseen devices {unseen:.1f} % ({each})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=0.3)
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--train", type=Path, nargs="+", metavar="CLIPS")
    parser.add_argument("--size", choices=TABLE_II, default="sm4")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--match", action="append", metavar="TEXT", help="train only the plans whose line has TEXT")
    args = parser.parse_args()
    choices = channel_choices()
    plans: dict[str, ChannelPlan] = {}
    # Prefer round channel numbers, which fill vector registers, then the closest fit.
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
        head = f"{structure.blocks} {structure.pools} {structure.expansions}"
        found.append((sizes, "\n".join([f"{head}: {sizes} of 4 sizes", *lines])))
        if sizes == len(TABLE_II):
            plans[f"{head} {[*closest.stem, *(stage.channels for stage in closest.stages)]}"] = closest
    for _, text in sorted(found, key=lambda item: item[0]):
        print(text)
    if args.train:
        some = {head: plan for head, plan in plans.items() if any(text in head for text in args.match or [""])}
        rank(args.train, some, args.epochs, args.seeds)


if __name__ == "__main__":
    main()
