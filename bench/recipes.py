"""Choose a recipe by leaving corpora out: train a student by each recipe on each corpus, and compare.

    python bench/recipes.py OUT CLIPS [CLIPS ...] [--recipes NAME ...] [--model cp_mobile] [--seeds 0 ...]
                            [--epochs 30] [--processes N] [--threads 1]

CLIPS are clip stores (`storage/clips/NAME-KEY`) of the corpora that bench/corpora.py makes. NAME is a preset's name, or
one of `design-1` to `design-8`: eight of the 32 recipes that five settings give. Students have no teacher and hear all
training clips; scores are of the test split.

Each training is scored by its last weights, and beside that by the mean of its last 3, 5 and 8 epochs' weights.

A training that OUT already has is not made again. Printed are each recipe's mean over the corpora, the effects of the
settings with their standard errors over the corpora, and what choosing on all other corpora gives on the one left out.
"""

import argparse
import itertools
import json
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from asc_ray.audio.frontend import LogMel
from asc_ray.config.composition import merged, network_preset, preset
from asc_ray.data.config import PartitionConfig
from asc_ray.evaluation.artifact import score
from asc_ray.evaluation.scores import Evaluation
from asc_ray.models.registry import build
from asc_ray.students.config import StudentConfig
from asc_ray.training.dataset import Dataset, Source
from asc_ray.training.folder import Metrics
from asc_ray.training.loop import fit
from asc_ray.training.validation import predict

# The first value of each is that of `short`.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "batch 64, not 16": ({"optimizer": {"batch_size": 16}}, {"optimizer": {"batch_size": 64}}),
    "adam, not adamw": (
        {"optimizer": {"kind": "adamw", "weight_decay": 0.001}},
        {"optimizer": {"kind": "adam", "weight_decay": 0.0001}},
    ),
    "rate 0.001, not 0.003": ({"optimizer": {"learning_rate": 0.003}}, {"optimizer": {"learning_rate": 0.001}}),
    "no balance": ({"balance": 0.5}, {"balance": 0.0}),
    "DIR on all devices": ({"augment": {"dir": {"apply_to": ["a"]}}}, {"augment": {"dir": {"apply_to": "all"}}}),
}


def design() -> dict[str, tuple[int, ...]]:
    """Return eight recipes as choices of the five SETTINGS: a fraction 2^(5-2) that has `short` and CP-JKU's loop.

    Balance goes with optimizer x rate, DIR with batch x optimizer; batch x rate goes with no single setting.
    """
    rows = [(a, b, c, b ^ c, a ^ b) for a, b, c in itertools.product((0, 1), repeat=3)]
    return {f"design-{number}": row for number, row in enumerate(rows, 1)}


def recipe_of(name: str, model: str, seed: int, epochs: int) -> StudentConfig:
    rows = design()
    raw = preset("recipe", "short" if name in rows else name, ("recipes",))
    raw = merged(merged(raw, network_preset(model)), {"seed": seed})
    for choice, values in zip(rows.get(name, ()), SETTINGS.values(), strict=False):
        raw = merged(raw, values[choice])
    raw["distillation"] = {"soft_target": "none"}
    recipe = StudentConfig.model_validate(raw)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.scaled_to(epochs)})


AVERAGED = (1, 3, 5, 8)


def trained(
    data: Dataset, recipe: StudentConfig, train: np.ndarray, averaged: Sequence[int] = (1,)
) -> tuple[dict[int, Evaluation], list[Metrics]]:
    """Train a student on the store's clips `train`, without teachers.

    Return the test scores of the mean of the last n epochs' weights, by each n of `averaged` that there are epochs for,
    and the epochs.
    """
    store, test = data.store, data.parts["test"]
    model = build(recipe.model, len(store.labels), recipe.seed)
    last: deque[dict[str, Tensor]] = deque(maxlen=max(averaged))

    def keep(metrics: Metrics) -> None:
        last.append({name: value.clone() for name, value in model.state_dict().items()})

    with tempfile.TemporaryDirectory() as folder:
        history = fit(model, recipe, data, train, Path(folder), on_epoch=keep)
    scores = {}
    for count in (number for number in averaged if number <= len(history)):
        some = list(last)[-count:]
        mean = {
            name: torch.stack([state[name] for state in some]).mean(0) if value.is_floating_point() else value
            for name, value in some[-1].items()
        }
        model.load_state_dict(mean)
        logits = predict(model, LogMel(recipe.frontend), store, test, torch.device("cpu")).numpy()
        scores[count] = score(store, test, logits)
    return scores, history


def worth(clips: Path, recipe: StudentConfig, threads: int = 1) -> dict[str, float]:
    """Return the scores of the test split after a training on all training clips."""
    torch.set_num_threads(threads)
    data = Source(clips, PartitionConfig()).open(test=True)
    scores, history = trained(data, recipe, np.flatnonzero(data.store.split == "train"), AVERAGED)
    figures = {"train": 100 * history[-1]["train_accuracy"]}
    for count, own in scores.items():
        of_mean = f", mean of {count}" if count > 1 else ""
        figures[f"log_loss{of_mean}"] = own.log_loss
        figures[f"all{of_mean}"] = 100 * own.accuracy
        figures[f"unseen{of_mean}"] = 100 * own.accuracies()["unseen"]
    return figures


def report(table: pd.DataFrame) -> None:
    """Print means, effects and what leaving corpora out gives; `table` has a line a training."""
    scores = ["all", "unseen", "log_loss"]
    means = table.groupby(["recipe", "corpus"])[scores].mean()
    complete = means["all"].unstack().dropna(axis=1).columns  # corpora that every recipe was trained on
    if complete.empty:
        print("no corpus has been trained on by every recipe yet")
        return
    means = means[means.index.get_level_values("corpus").isin(complete)]
    print(f"corpora: {', '.join(complete)}\n")
    print(means.groupby("recipe").mean().round(3).to_string(), "\n")
    print(means["all"].unstack().round(1).to_string(), "\n")
    rows = {name: row for name, row in design().items() if name in table["recipe"].unique()}
    if len(rows) == len(design()):
        signs = pd.DataFrame(rows, index=list(SETTINGS)).T
        for one in scores:
            by_corpus = means[one].unstack().loc[signs.index]
            for setting in SETTINGS:
                effect = by_corpus[signs[setting] == 1].mean() - by_corpus[signs[setting] == 0].mean()
                error = effect.std(ddof=1) / np.sqrt(len(effect))
                print(f"{one}: {setting}: {effect.mean():+.3f} +- {error:.3f}")
            print()
    for one, count in itertools.product(scores, AVERAGED[1:]):
        if (name := f"{one}, mean of {count}") in table:
            gained = (table[name] - table[one]).dropna()
            spread = table.groupby(["recipe", "corpus"])[[one, name]].std(ddof=1).dropna().mean()
            print(f"{name}: {gained.mean():+.3f} +- {gained.sem():.3f} in {len(gained)} trainings; deviation of seeds "
                  f"{spread[name]:.3f}, of the last weights {spread[one]:.3f}")  # fmt: skip
    loss = means["log_loss"].unstack()
    for corpus in complete if len(complete) > 1 else []:
        chosen = str(loss.drop(columns=corpus).mean(axis=1).idxmin())
        found = means.loc[(chosen, corpus)]
        print(f"{corpus}, left out: {chosen} is chosen: {found['all']:.1f} ({found['unseen']:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--recipes", nargs="+", default=list(design()))
    parser.add_argument("--model", default="cp_mobile")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed, clips, name in itertools.product(options.seeds, options.clips, options.recipes):
        corpus = clips.name.rpartition("-")[0]
        file = options.out / f"{corpus}.{options.model}.{name}.{options.epochs}.{seed}.json"
        about = {"corpus": corpus, "model": options.model, "recipe": name, "seed": seed}
        runs[file] = about, clips, recipe_of(name, options.model, seed, options.epochs)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(worth, clips, recipe, options.threads): (file, about)
            for file, (about, clips, recipe) in runs.items()
            if not file.exists()
        }
        try:
            for done in as_completed(waiting):
                file, about = waiting[done]
                file.write_text(json.dumps(about | done.result()))
                print(file.read_text(), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report(pd.DataFrame([json.loads(file.read_text()) for file in runs]))


if __name__ == "__main__":
    main()
