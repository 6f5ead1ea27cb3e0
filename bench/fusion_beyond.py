"""Compare richer fusions with eq. 4 on the logits of finished pipelines: log loss and accuracy on held-out places.

    python bench/fusion_beyond.py STORAGE [STORAGE ...]

All are learned on the part `fusion` and scored on the part `validation` and on the test split. Their parameters beyond
eq. 4 have a ridge of their own, which pulls them to zero and is chosen like the fusion's, by cross-validation over
places:

    by class     w_s + v_sk, on log-posteriors (a constant added to a clip's logits changes these fusions, not eq. 4)
    by device    w_s + v_sd for the devices of the training split; for others w_s
    matrix       sum_s (w_s I + V_s) p_s, p_s the log-posteriors of system s (Brummer's general form)
    network      eq. 4 and a network of one hidden layer on all log-posteriors, the mean of five

Eq. 4 on log-posteriors has no row: they differ from logits by one number a clip, which the softmax drops.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from asc_ray.artifacts import MANIFEST, read_manifest
from asc_ray.data.config import PartitionConfig
from asc_ray.data.logits import Ensemble, Logits, read_logits
from asc_ray.ensemble.fusion import fit
from asc_ray.ensemble.newton import Shard, sums
from asc_ray.evaluation.gains import gain
from asc_ray.evaluation.scores import log_posteriors
from asc_ray.training.dataset import Dataset, Source

RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
FOLDS = 5

Features = Callable[[np.ndarray, np.ndarray], np.ndarray]  # log-posteriors (S, N, K), devices (N,) -> (P, N, K)


def by_class(values: np.ndarray, _: np.ndarray) -> np.ndarray:
    count = values.shape[2]
    return np.concatenate([values * (np.arange(count) == k) for k in range(count)])


def by_device(values: np.ndarray, device: np.ndarray) -> np.ndarray:
    return np.concatenate([values * (device == name)[:, None] for name in DEVICES])


def matrix(values: np.ndarray, _: np.ndarray) -> np.ndarray:
    count = values.shape[2]
    return np.concatenate(
        [values[:, :, k : k + 1] * (np.arange(count) == j) for k in range(count) for j in range(count)]
    )


DEVICES: list[str] = []


def convex(features: Features) -> Callable[..., np.ndarray]:
    """Return a fusion like eq. 4 with `features` beside the systems, and a ridge for each of the two."""

    def learn_and_apply(learn, apply, ridge: float, own: float) -> np.ndarray:
        (values, labels, device), (others, _, other_device) = learn, apply
        both, count = np.concatenate([values, features(values, device)]), len(values)
        base = fit(values, labels, ridge=ridge)
        theta = np.zeros(len(both) + values.shape[2])
        theta[:count] = base.center
        center, pull = theta.copy(), np.concatenate([ridge * base.noise**2, np.full(len(both) - count, own)])
        pull = np.concatenate([pull, np.full(values.shape[2], ridge)])
        weights = np.full(values.shape[2], 1 / len(labels))
        for _ in range(30):
            found = sums(Shard(lambda: both, labels), theta, weights)
            gradient = found.gradient + pull * (theta - center)
            if np.abs(gradient).max() < 1e-8:
                break
            theta = theta - np.linalg.solve(found.hessian + np.diag(pull), gradient)
        together = np.concatenate([others, features(others, other_device)])
        return np.tensordot(theta[: len(both)], together, axes=1) + theta[len(both) :]

    return learn_and_apply


def network(learn, apply, ridge: float, own: float) -> np.ndarray:
    (values, labels, _), (others, _, _) = learn, apply
    base = fit(values, labels, ridge=ridge)
    inputs, scale = (np.concatenate(list(x), axis=1) for x in (values, others)), np.abs(values).mean()
    x, new = (torch.tensor(part / scale, dtype=torch.float32) for part in inputs)
    y, start = torch.tensor(labels), torch.tensor(base.apply(values))
    corrections = []
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], 16), nn.Tanh(), nn.Linear(16, values.shape[2]))
        nn.init.zeros_(net[2].weight)
        nn.init.zeros_(net[2].bias)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(400):
            penalty = sum((p**2).sum() for p in net.parameters())
            loss = nn.functional.cross_entropy(start + net(x), y) + own / 20 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        corrections.append(net(new).detach().numpy())
    return base.apply(others) + np.mean(corrections, axis=0)


METHODS = {"by class": convex(by_class), "by device": convex(by_device), "matrix": convex(matrix), "network": network}


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_posteriors(logits)[np.arange(len(labels)), labels].mean())


def finished(storage: Path) -> tuple[Dataset, list[Logits]]:
    """Open a finished pipeline's clips, divided as for its newest fusion, and the logits of that fusion's systems."""
    newest = max((storage / "fusion").glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
    manifest = read_manifest(newest.parent)
    parts = PartitionConfig.model_validate(manifest["config"]["partition"])
    data = Source(next((storage / "clips").iterdir()), parts).open(test=True)
    names = manifest["facts"]["weights"]
    return data, [read_logits(storage / "logits" / f"{name}-{manifest['inputs'][name]}") for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storages", type=Path, nargs="+")
    for storage in parser.parse_args().storages:
        data, systems = finished(storage)
        store = data.store
        DEVICES[:] = sorted(set(store.device[store.split == "train"]))

        def part(rows: np.ndarray, systems=systems, store=store):
            logits = Ensemble(systems, store.ids[rows]).read()
            return np.stack([log_posteriors(z) for z in logits]), store.scene[rows], store.device[rows]

        learn, parts = part(data.parts["fusion"]), {name: part(data.parts[name]) for name in ("validation", "test")}
        places = store.place[data.parts["fusion"]]
        names = np.unique(places)
        np.random.default_rng(0).shuffle(names)
        fusion = fit(learn[0], learn[1], places=places)
        outputs = {name: {"average": v.mean(0), "eq. 4": fusion.apply(v)} for name, (v, _, _) in parts.items()}
        chosen = {"average": "", "eq. 4": f"{fusion.ridge:.3g}"}
        for method, run in METHODS.items():
            losses = []
            for own in RIDGES:
                total = 0.0
                for fold in range(FOLDS):
                    held = np.isin(places, names[fold::FOLDS])
                    (v, y, d), rest = learn, ~held
                    z = run((v[:, rest], y[rest], d[rest]), (v[:, held], y[held], d[held]), fusion.ridge, own)
                    total += log_loss(z, y[held]) * held.sum()
                losses.append(total)
            own = RIDGES[int(np.argmin(losses))]
            chosen[method] = f"{own:.3g}"
            for name, some in parts.items():
                outputs[name][method] = run(learn, some, fusion.ridge, own)
        print(f"\n{storage.name}: {len(learn[1])} clips to learn from, {len(parts['validation'][1])} held out, "
              f"{len(parts['test'][1])} test clips\n")  # fmt: skip
        print("| fusion | its ridge | held-out log loss | % right | test log loss | % right | gain over eq. 4 (95 %) |")
        print("|---|---|---|---|---|---|---|")
        for method, text in chosen.items():
            cells = [method, text]
            for name, (_, labels, _) in parts.items():
                z = outputs[name][method]
                cells += [f"{log_loss(z, labels):.3f}", f"{100 * (z.argmax(1) == labels).mean():.1f}"]
            rows = data.parts["test"]
            before, labels = outputs["test"]["eq. 4"], parts["test"][1]
            loss = gain(before, outputs["test"][method], labels, store.place[rows]).log_loss
            print("| " + " | ".join([*cells, f"{loss.value:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})"]) + " |")


if __name__ == "__main__":
    main()
