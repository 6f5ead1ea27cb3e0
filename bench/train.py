"""Measure what a training step costs: clips/s of the whole loop, and how the time divides.

    python bench/train.py CLIPS [--model cp_mobile|sm1..sm4|cp_resnet|passt] [--batch 32] [--epochs 3] [--threads N]
                          [--compile] [--plain] [--mode mapped|resident]

CLIPS is a finished clip store (`storage/clips/NAME-KEY` of any run). The loop is training/loop.py as every stage runs
it, with roll, DIR 0.6, Freq-MixStyle 0.4 and frequency masking (--plain: none). An epoch is the part `train`. The
clips/s are those of the epochs after the first; one more epoch, under torch's profiler, gives the division of the time.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from asc_ray.data.config import DataConfig, PartitionConfig
from asc_ray.models.registry import build
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source
from asc_ray.training.loop import fit

PARTS = ("data", "augmentation", "front end", "forward", "backward", "optimizer")
AUGMENT = {
    "roll": 4000,
    "dir": {"p": 0.6, "apply_to": "all"},
    "freq_mixstyle": {"p": 0.4},
    "freq_mask": 48,
    "time_mask": 8,
}


def matrix_product_gflops() -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=1).median / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--model", default="cp_mobile")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plain", action="store_true", help="no augmentation")
    parser.add_argument("--mode", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    name = options.model
    recipe = Recipe.model_validate(
        {
            "model": {"name": "ds_flexinet", "size": name} if name.startswith("sm") else {"name": name},
            "augment": {} if options.plain else AUGMENT,
            "optimizer": {"epochs": options.epochs, "batch_size": options.batch},
            "compile": options.compile,
        }
    )
    data = Source(options.clips, PartitionConfig(), DataConfig(mode=options.mode)).open()
    train = data.parts["train"]
    print(
        f"{name}, {len(train)} clips, batch {options.batch}, {data.waves(train, torch.device('cpu')).mode}, "
        f"{options.threads} threads, torch {torch.__version__}; matrix product {matrix_product_gflops():.0f} GFLOP/s"
    )

    def run(epochs: int) -> list[dict[str, float]]:
        settings = recipe.optimizer.model_copy(update={"epochs": epochs})
        model = build(recipe.model, len(data.store.labels), recipe.seed)
        with tempfile.TemporaryDirectory() as folder:
            own = recipe.model_copy(update={"optimizer": settings})
            return fit(model, own, data, train, Path(folder))

    rates = [metrics["clips_per_second"] for metrics in run(options.epochs + 1)][1:]
    print(f"whole loop: median {statistics.median(rates):.1f} clips/s, from {min(rates):.1f} to {max(rates):.1f}")

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(1)
    times = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        if event.key in times:
            times[event.key] += event.cpu_time_total
    whole = sum(times.values())
    for part, spent in times.items():
        print(f"  {part:<13} {spent / len(train):8.1f} us a clip  {100 * spent / whole:5.1f} %")
    share = sum(times[part] for part in ("data", "augmentation")) / whole
    print(f"  data and augmentation: {100 * share:.1f} % of the step")


if __name__ == "__main__":
    main()
