"""Choose a recipe by leaving corpora out: train a student by each recipe on each corpus, and compare.

    python bench/recipes.py OUT CLIPS [CLIPS ...] [--recipes NAME ...] [--model cp_mobile] [--seeds 0 ...]
                            [--epochs 30] [--processes N] [--threads 1]

CLIPS are clip stores (`storage/clips/NAME-KEY`) of the corpora that bench/corpora.py makes. NAME is a preset's name, or
one of `design-1` to `design-8`: eight of the 32 recipes that five settings give. Students have no teacher and hear all
training clips; scores are of the test split.

A training that OUT already has is not made again. Printed are each recipe's mean over the corpora, the effects of the
settings with their standard errors over the corpora, and what choosing on all other corpora gives on the one left out.
"""

import argparse
import itertools
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from asc_ray.audio.frontend import LogMel
from asc_ray.config.composition import merged, network_preset, preset
from asc_ray.data.division import PartitionConfig
from asc_ray.evaluation.artifact import score
from asc_ray.evaluation.scores import Evaluation
from asc_ray.models.registry import build
from asc_ray.students.config import StudentConfig
from asc_ray.training.dataset import Dataset, Source
from asc_ray.training.loop import fit
from asc_ray.training.validation import Metrics, predict

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


def trained(data: Dataset, recipe: StudentConfig, train: np.ndarray) -> tuple[Evaluation, list[Metrics]]:
    """Train a student on the store's clips `train`, without teachers; return its test scores and its epochs."""
    store, test = data.store, data.parts["test"]
    model = build(recipe.model, len(store.labels), recipe.seed)
    with tempfile.TemporaryDirectory() as folder:
        history = fit(model, recipe, data, train, Path(folder))
    logits = predict(model, LogMel(recipe.frontend), store, test, torch.device("cpu")).numpy()
    return score(store, test, logits), history


def worth(clips: Path, recipe: StudentConfig, threads: int = 1) -> dict[str, float]:
    """Return the scores of the test split after a training on all training clips."""
    torch.set_num_threads(threads)
    data = Source(clips, PartitionConfig()).open(test=True)
    scores, history = trained(data, recipe, np.flatnonzero(data.store.split == "train"))
    return {
        "log_loss": scores.log_loss,
        "all": 100 * scores.accuracy,
        "unseen": 100 * scores.accuracies()["unseen"],
        "train": 100 * history[-1]["train_accuracy"],
    }


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
