"""Measure the overhead of training all teachers at once: wall time over (sum of training seconds / slots).

    python bench/fanout.py CLIPS [--teachers 12] [--seconds 20] [--slots 2]

CLIPS is a finished clip store (`storage/clips/NAME-KEY` of any run). Every teacher is a small CP-ResNet
with as many epochs as take about --seconds in one slot of one CPU. Its training seconds are those of its epochs, as the
loop counts them, with augmentation and validation. Everything else is overhead: starting Ray's trainers and workers,
opening the clips, building networks, checkpoints, finishing artifacts, and slots that wait for the last teacher.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import ray
import torch

from asc_ray.artifacts import Artifact
from asc_ray.cluster.teachers import Teacher, train_teachers
from asc_ray.data.config import PartitionConfig
from asc_ray.ensemble.teachers import train_teacher
from asc_ray.resources import TrainerResources
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source


def recipe(seed: int, epochs: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "cp_resnet", "width": 8},
            "frontend": {"hop": 750},
            "augment": {"roll": 4000, "freq_mixstyle": {"p": 0.4}},
            "optimizer": {"epochs": epochs, "batch_size": 64},
            "seed": seed,
        }
    )


def training_seconds(artifact: Artifact) -> float:
    return sum(metrics["seconds"] for metrics in artifact.facts()["history"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--teachers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--slots", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = Source(options.clips, PartitionConfig())
    with tempfile.TemporaryDirectory() as folder:

        def artifact(name: str) -> Artifact:
            return Artifact(Path(folder), "teachers", name, "0", {}, {})

        trial = artifact("trial")
        train_teacher(trial, source, recipe(0, epochs=3))
        epochs = max(1, round(options.seconds / min(m["seconds"] for m in trial.facts()["history"])))
        teachers = {
            f"teacher-{n:02d}": Teacher(artifact(f"teacher-{n:02d}"), recipe(n, epochs), source, TrainerResources())
            for n in range(options.teachers)
        }
        ray.init(
            address="local",
            num_cpus=options.slots,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        start = time.perf_counter()
        failed = train_teachers(teachers, 0, lambda name, event: None)
        wall = time.perf_counter() - start
        ray.shutdown()
        if failed:
            raise SystemExit(f"failed: {failed}")
        spent = [training_seconds(teacher.artifact) for teacher in teachers.values()]
    ideal, shortest, longest = sum(spent) / options.slots, min(spent), max(spent)
    print(
        f"{len(spent)} teachers of {epochs} epochs, {shortest:.1f} to {longest:.1f} s each, {options.slots} slots: "
        f"wall {wall:.1f} s, training {sum(spent):.1f} s\n"
        f"ratio {wall / ideal:.3f}; overhead {(wall - ideal) * options.slots / len(spent):.2f} s a teacher"
    )


if __name__ == "__main__":
    main()
