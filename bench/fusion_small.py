"""The fusion where honest clips are few: regret against the best weights and biases that there are.

    python bench/fusion_small.py [--repeats 8] [--sizes SIZE ...] [--storage STORAGE ...] [--csv FILE]

Ensembles are made up: systems of two families, whose answers are alike within a family and within a place. By the kind
of ensemble, half of them are weak, some are copies of another, badly calibrated, or sure and wrong. Each rule learns
from few clips of few places and is judged on 20,000 clips of 400 other places. Regrets are measured from the best that
there is: eq. 4 fitted to those clips themselves. With STORAGE, the logits of finished pipelines stand for the made-up
ones: the rules learn from the part `fusion` and are judged on the test split.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from fusion_beyond import log_loss

from asc_ray.data.clips import ClipStore
from asc_ray.data.division import PartitionConfig
from asc_ray.data.logits import Ensemble, read_logits
from asc_ray.ensemble.fusion import fit
from asc_ray.training.dataset import Source

# Clips and their places to learn from.
SIZES = {"50/10": (50, 10), "128/18": (128, 18), "500/50": (500, 50), "5000/200": (5_000, 200)}
KINDS = ("alike", "weak half", "copies", "badly calibrated", "sure and wrong")
TEST_CLIPS, TEST_PLACES = 20_000, 400
BAGS, ROUNDS = 20, 30

Clips = tuple[np.ndarray, np.ndarray, np.ndarray]  # logits (S, N, K) float32, scene (N,), place (N,)
Applied = Callable[[np.ndarray], np.ndarray]


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
        self.copy_of = np.arange(systems)
        if kind == "weak half":
            self.signal[self.family == 1] = rng.uniform(0.4, 1.0)
        elif kind == "copies":
            self.copy_of[systems // 2 :] = 0
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


def eq4(learn: Clips) -> Applied:
    return fit(learn[0], learn[1], places=learn[2]).apply


RULES: dict[str, Callable[[Clips], Applied]] = {
    "average": average, "best single system": best_single, "greedy selection": greedy, "eq. 4": eq4,
}  # fmt: skip


def regrets(learn: Clips, test: Clips) -> list[dict[str, object]]:
    """Return for each rule what it loses against eq. 4 fitted to the test clips: nats, and points of accuracy."""
    best = fit(test[0], test[1], ridge=1e-6).apply(test[0])
    least, most = log_loss(best, test[1]), float((best.argmax(1) == test[1]).mean())
    rows: list[dict[str, object]] = []
    for name, rule in RULES.items():
        found = rule(learn)(test[0])
        points = 100 * (most - float((found.argmax(1) == test[1]).mean()))
        rows.append({"rule": name, "nats": log_loss(found, test[1]) - least, "points": points, "best": 100 * most})
    return rows


def stored(storage: Path) -> tuple[Clips, Clips]:
    """Read the systems' logits of a finished pipeline: of the part `fusion`, and of the test split."""
    folder = next((storage / "clips").iterdir())
    data, store = Source(folder, PartitionConfig()).open(test=True), ClipStore(folder)
    systems = [read_logits(path) for path in sorted((storage / "logits").iterdir())]

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
        print(table.groupby(by, sort=False)[["nats", "points"]].agg(["mean", "max"]).round(3).to_string(), "\n")


if __name__ == "__main__":
    main()
