"""The fusion where honest clips are few: regret against the best weights and biases that there are.

    python bench/fusion_small.py [--repeats 8] [--sizes SIZE ...] [--storage STORAGE ...] [--csv FILE]

Ensembles are made up: systems of two families, whose answers are alike within a family and within a place. By the kind
of ensemble, half of them are weak, some are copies of another, badly calibrated, or sure and wrong. Each rule learns
from few clips of few places and is judged on 20,000 clips of 10,000 other places. Regrets are measured from the best
that there is: eq. 4 fitted to those clips themselves. With STORAGE, the logits of finished pipelines stand for the
made-up ones: the rules learn from the part `fusion` and are judged on the test split.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fusion_beyond import finished, log_loss

from asc_ray.data.logits import Ensemble
from asc_ray.ensemble.choice import FOLDS
from asc_ray.ensemble.fusion import fit
from asc_ray.ensemble.newton import Problem, Pull, Shard, minimize

# Clips and their places to learn from.
SIZES = {"50/10": (50, 10), "128/18": (128, 18), "500/50": (500, 50), "5000/200": (5_000, 200)}
KINDS = ("alike", "weak half", "copies", "badly calibrated", "sure and wrong")
TEST_CLIPS, TEST_PLACES = 20_000, 10_000
BAGS, ROUNDS = 20, 30
RIDGES_THEN = tuple(float(10**e) for e in np.arange(-4.0, 1.1, 0.5))

Clips = tuple[np.ndarray, np.ndarray, np.ndarray]  # logits (S, N, K) float32, scene (N,), place (N,)
Applied = Callable[[np.ndarray], np.ndarray]
Rule = Callable[[Clips], Applied]


class MadeUp:
    """An ensemble of one kind; `clips` draws clips of new places with its logits."""

    def __init__(self, rng: np.random.Generator, kind: str, systems: int, scenes: int) -> None:
        self.rng, self.kind, self.scenes = rng, kind, scenes
        common = 0.5 * rng.standard_normal((scenes, scenes))
        self.confusion = [common + 0.3 * rng.standard_normal((scenes, scenes)) for _ in range(2)]
        self.family = np.arange(systems) % 2
        self.strength, self.signal = rng.uniform(0.8, 1.2, systems), np.full(systems, 2.8)
        self.scale = np.ones(systems)
        self.order = np.tile(np.arange(scenes), (systems, 1))
        self.copy_of = list(range(systems))
        if kind == "weak half":
            self.signal[self.family == 1] = rng.uniform(0.4, 1.0)
        elif kind == "copies":
            self.copy_of[systems // 2 :] = [0] * (systems - systems // 2)
        elif kind == "badly calibrated":
            self.scale = np.exp(rng.uniform(np.log(0.2), np.log(4.0), systems))
        elif kind == "sure and wrong":
            self.scale[-1], self.order[-1] = 4.0, rng.permutation(scenes)

    def clips(self, count: int, places: int) -> Clips:
        """Draw clips; every scene has a place, and the clips of a place are alike."""
        rng, systems = self.rng, len(self.family)
        scene_at = rng.permutation(np.arange(places) % self.scenes)
        place = rng.permutation(np.arange(count) % places)
        scene = scene_at[place]
        logits = np.empty((systems, count, self.scenes), np.float32)
        at_place = rng.standard_normal((places, self.scenes))
        clip = rng.standard_normal((count, self.scenes))
        for family, confusion in enumerate(self.confusion):
            own_place = rng.standard_normal((places, self.scenes))
            own_clip = rng.standard_normal((count, self.scenes))
            common = np.sqrt(0.1 if self.kind == "weak half" else 0.7)  # of what places and clips do to a family
            place_noise = common * at_place + np.sqrt(1 - common**2) * own_place
            clip_noise = common * clip + np.sqrt(1 - common**2) * own_clip
            shared = place_noise[place] + clip_noise + confusion[scene]
            for s in np.flatnonzero(self.family == family):
                own = rng.standard_normal((count, self.scenes))
                logits[s] = self.strength[s] * (shared + self.signal[s] * np.eye(self.scenes)[scene]) + own
        for s, other in enumerate(self.copy_of):
            if other != s:
                logits[s] = logits[other] + 0.05 * rng.standard_normal((count, self.scenes))
        logits *= self.scale[:, None, None]
        return np.stack([z[:, order] for z, order in zip(logits, self.order, strict=True)]), scene, place


def average(learn: Clips) -> Applied:
    return lambda logits: logits.mean(axis=0)


def best_single(learn: Clips) -> Applied:
    best = int(np.argmin([log_loss(z, learn[1]) for z in learn[0]]))
    return lambda logits: logits[best]


def greedy(learn: Clips) -> Applied:
    """Caruana et al., 2004: systems are added one by one, with replacement, in bags of places."""
    logits, scene, place = learn
    rng, names, counts = np.random.default_rng(0), np.unique(place), np.zeros(len(logits))
    for _ in range(BAGS):
        drawn = rng.choice(names, len(names))
        rows = np.concatenate([np.flatnonzero(place == name) for name in drawn])
        values, target = logits[:, rows].astype(np.float64), scene[rows]
        total, chosen, trace = np.zeros(values.shape[1:]), np.zeros(len(logits)), []
        for number in range(1, ROUNDS + 1):
            losses = [log_loss((total + z) / number, target) for z in values]
            best = int(np.argmin(losses))
            total, chosen = total + values[best], chosen + np.eye(len(logits))[best]
            trace.append((losses[best], chosen.copy() / number))
        counts += min(trace, key=lambda one: one[0])[1]
    weights = counts / BAGS
    return lambda logits: np.tensordot(weights, logits, axes=1)


def towards_the_average(learn: Clips) -> Applied:
    """Eq. 4 as it was until 2026-11-26: ridge / 2 (|w - 1/S|^2 + |b|^2), the ridge by one 5-fold cross-validation."""
    logits, scene, place = learn
    systems, _, scenes = logits.shape
    center, unit = np.full(systems, 1 / systems), np.ones(systems)

    def learned(some: np.ndarray, ridge: float) -> np.ndarray:
        shards, weights = [Shard(lambda: logits[:, some], scene[some])], np.full(scenes, 1 / len(some))
        problem = Problem(shards, weights, Pull(center, unit, ridge))
        return minimize(problem, problem.start, 1e-6 * max(1.0, ridge)).theta

    def applied(theta: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.tensordot(theta[:systems], values, axes=1) + theta[systems:]

    names = np.random.default_rng(0).permutation(np.unique(place))
    losses = np.zeros(len(RIDGES_THEN))
    for fold in range(FOLDS):
        held = np.isin(place, names[fold::FOLDS])
        for index, ridge in enumerate(RIDGES_THEN):
            found = applied(learned(np.flatnonzero(~held), ridge), logits[:, held])
            losses[index] += held.sum() * log_loss(found, scene[held])
    best = learned(np.arange(len(scene)), RIDGES_THEN[int(losses.argmin())])
    return lambda values: applied(best, values)


def eq4(learn: Clips) -> Applied:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few places
        return fit(learn[0], learn[1], places=learn[2]).apply


SIMPLE: dict[str, Rule] = {"average": average, "best single system": best_single, "greedy selection": greedy}
RULES: dict[str, Rule] = {**SIMPLE, "eq. 4 towards the average": towards_the_average, "eq. 4": eq4}


def regrets(learn: Clips, test: Clips) -> list[dict[str, Any]]:
    """Return what each rule loses against eq. 4 fitted to the test clips, in nats and in points of accuracy.

    `behind` is by how many points it is behind the best of the simple rules.
    """
    best = fit(test[0], test[1], ridge=1e-6).apply(test[0])
    least, most = log_loss(best, test[1]), float((best.argmax(1) == test[1]).mean())
    rows: list[dict[str, Any]] = []
    for name, rule in RULES.items():
        found = rule(learn)(test[0])
        points = 100 * (most - float((found.argmax(1) == test[1]).mean()))
        rows.append({"rule": name, "nats": log_loss(found, test[1]) - least, "points": points, "best": 100 * most})
    simple = min(float(row["points"]) for row in rows if row["rule"] in SIMPLE)
    return [{**row, "behind": row["points"] - simple} for row in rows]


def stored(storage: Path) -> tuple[Clips, Clips]:
    """Read the systems' logits of a finished pipeline: of the part `fusion`, and of the test split."""
    data, systems = finished(storage)
    store = data.store

    def clips(part: str) -> Clips:
        rows = data.parts[part]
        return Ensemble(systems, store.ids[rows]).read(), store.scene[rows], store.place[rows]

    return clips("fusion"), clips("test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--storage", type=Path, nargs="+", default=[])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for storage in options.storage:
        rows += [{"size": storage.name, "kind": "stored", **row} for row in regrets(*stored(storage))]
    for size in [] if options.storage else options.sizes:
        count, places = SIZES[size]
        for repeat in range(options.repeats):
            for index, kind in enumerate(KINDS):
                rng = np.random.default_rng([repeat, index])
                scenes = min(int(rng.choice([7, 10, 50])), places)
                made = MadeUp(rng, kind, int(rng.choice([6, 12, 24])), scenes)
                found = regrets(made.clips(count, places), made.clips(TEST_CLIPS, TEST_PLACES))
                rows += [{"size": size, "kind": kind, "scenes": scenes, **row} for row in found]
    table = pd.DataFrame(rows)
    if options.csv:
        table.to_csv(options.csv, index=False)
    for by in (["size", "rule"], ["size", "kind", "rule"]):
        figures = table.groupby(by, sort=False)[["nats", "points", "behind"]].agg(["mean", "max"])
        print(figures.round(3).to_string(), "\n")


if __name__ == "__main__":
    main()
