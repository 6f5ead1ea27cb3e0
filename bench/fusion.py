"""Compare the fusion (eq. 4) with scipy's L-BFGS-B on the same objective; measure its memory with logits from files.

    python bench/fusion.py [--clips 139620] [--systems 12] [--scenes 10] [--ridge 1e-4] [--runs 5] [--storage STORAGE]
    python bench/fusion.py --write FOLDER [--clips 10000000]
    python bench/fusion.py --stream FOLDER

The ensemble is made up: systems of two families that confuse the same scenes on the same clips. With the STORAGE of a
finished pipeline, its systems' logits of the test split are drawn with replacement instead, and noise is added so that
no two clips are equal. scipy gets float64 logits and an analytic gradient, and is timed until its objective is within
1e-8 of ours; once with a direct implementation of the objective, once with one written for speed. They take turns.
--write makes up logits as Arrow files in FOLDER (5.5 GB for 10 million clips); --stream fuses them from there and
reports the peak memory of the process.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.optimize
import scipy.special
from memory import peak_memory

from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import Ensemble, read_logits, write_logits
from asc_ray.ensemble.fusion import Fusion, fit, fit_shards
from asc_ray.ensemble.newton import Shard

SHARD = 65_536

Loss = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[float, np.ndarray]]


def made_up(rng: np.random.Generator, clips: int, systems: int, scenes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return made-up logits (S, N, K) float32 and scenes (N,)."""
    labels = rng.integers(0, scenes, clips)
    difficulty = rng.lognormal(0, 0.7, (clips, 1))
    logits = np.empty((systems, clips, scenes), np.float32)
    for family in range(2):
        means = (2.5 + family) * np.eye(scenes) + rng.standard_normal((scenes, scenes)) * 0.7
        shared = means[labels] + difficulty * rng.standard_normal((clips, scenes))
        for system in range(family, systems, 2):
            logits[system] = (0.6 + 0.05 * system) * shared + 0.6 * rng.standard_normal((clips, scenes))
    return logits, labels


def drawn(rng: np.random.Generator, clips: int, storage: Path) -> tuple[np.ndarray, np.ndarray]:
    store = ClipStore(next((storage / "clips").iterdir()))
    rows = rng.choice(np.flatnonzero(store.split == "test"), clips)
    folders = sorted((storage / "logits").iterdir())
    test = np.unique(rows)
    logits = Ensemble([read_logits(folder) for folder in folders], store.ids[test]).read()
    logits = logits[:, np.searchsorted(test, rows)]
    return logits + 0.5 * rng.standard_normal(logits.shape, dtype=np.float32), store.scene[rows]


def written_down(z_s: np.ndarray, labels: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean cross-entropy of eq. 4 and its gradient by (w, b), in a direct implementation."""
    clip = np.arange(len(labels))
    log_p = scipy.special.log_softmax(np.tensordot(w, z_s, axes=1) + b, axis=1)
    error = np.exp(log_p)
    error[clip, labels] -= 1
    error /= len(labels)
    return -log_p[clip, labels].mean(), np.concatenate([np.tensordot(z_s, error, axes=2), error.sum(axis=0)])


def for_speed(z_s: np.ndarray, labels: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the same as `written_down`, with as few passes over the memory as NumPy allows."""
    flat, clip = z_s.reshape(len(z_s), -1), np.arange(len(labels))
    z = (w @ flat).reshape(-1, len(b))
    z += b
    z -= z.max(axis=1, keepdims=True)
    right = z[clip, labels]
    p = np.exp(z, out=z)
    total = p.sum(axis=1)
    value = (np.log(total) - right).mean()
    p /= total[:, None]
    p[clip, labels] -= 1
    p /= len(labels)
    return value, np.concatenate([flat @ p.reshape(-1), p.sum(axis=0)])


def lbfgs(loss: Loss, logits: np.ndarray, labels: np.ndarray, ours: Fusion) -> tuple[float, int]:
    """Return the seconds and evaluations until the objective is within 1e-8 of that of `ours`."""
    start = time.perf_counter()
    count_s, z_s = len(logits), logits.astype(np.float64)
    x0 = np.concatenate([ours.center, np.zeros(logits.shape[2])])
    strength = ours.ridge * np.concatenate([ours.noise**2, np.ones(logits.shape[2])])
    reached: list[float] = []

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(z_s, labels, theta[:count_s], theta[count_s:])
        pull = theta - x0
        value += strength @ pull**2 / 2
        reached.append(value)
        if value <= ours.objective_after + 1e-8:
            raise StopIteration
        return value, gradient + strength * pull

    try:
        options = {"ftol": 0.0, "gtol": 0.0, "maxiter": 10_000, "maxfun": 10_000}
        scipy.optimize.minimize(objective, x0, jac=True, method="L-BFGS-B", options=options)
        sys.exit(f"L-BFGS-B ended {min(reached) - ours.objective_after:.1e} above our objective")
    except StopIteration:
        return time.perf_counter() - start, len(reached)


def compare(logits: np.ndarray, labels: np.ndarray, ridge: float, runs: int) -> None:
    times: dict[str, list[float]] = {"ours": [], "L-BFGS-B": [], "L-BFGS-B, for speed": [], "ours, ridge: auto": []}
    for _ in range(runs):
        start = time.perf_counter()
        fusion = fit(logits, labels, ridge=ridge)
        times["ours"].append(time.perf_counter() - start)
        for name, loss in (("L-BFGS-B", written_down), ("L-BFGS-B, for speed", for_speed)):
            seconds, evaluations = lbfgs(loss, logits, labels, fusion)
            times[name].append(seconds)
        start = time.perf_counter()
        fit(logits, labels)
        times["ours, ridge: auto"].append(time.perf_counter() - start)
    print(f"{logits.shape} logits, ridge {ridge:g}, {runs} runs, {os.cpu_count()} cores")
    print(f"{fusion.iterations} Newton steps, {evaluations} evaluations of L-BFGS-B")
    for name, spent in times.items():
        ratios = sorted(b / a for a, b in zip(times["ours"], spent, strict=True))
        print(
            f"{name:20} median {statistics.median(spent):6.2f} s, from {min(spent):.2f} to {max(spent):.2f}; "
            f"ratio {statistics.median(ratios):.1f}, from {ratios[0]:.1f} to {ratios[-1]:.1f}"
        )


def write(folder: Path, clips: int, systems: int, scenes: int) -> None:
    names = [f"scene {k}" for k in range(scenes)]
    labels = []
    for part, start in enumerate(range(0, clips, SHARD)):
        count = min(SHARD, clips - start)
        logits, y = made_up(np.random.default_rng(part), count, systems, scenes)
        labels.append(y)
        ids = pa.array([f"clip-{n}.wav" for n in range(start, start + count)])
        for system, values in enumerate(logits):
            (folder / f"system-{system}").mkdir(parents=True, exist_ok=True)
            metadata = {
                "system": f"system-{system}",
                "labels": json.dumps(names),
                "corpus": "made up",
                "split": "train",
            }
            write_logits(folder / f"system-{system}" / f"train-{part:05d}.arrow", ids, values, metadata)
    np.save(folder / "labels.npy", np.concatenate(labels))


def stream(folder: Path) -> None:
    systems = [read_logits(path) for path in sorted(folder.glob("system-*"))]
    labels = np.load(folder / "labels.npy")
    ensemble = Ensemble(systems, systems[0].keys)
    rows = [slice(start, start + SHARD) for start in range(0, len(labels), SHARD)]
    start = time.perf_counter()
    fusion = fit_shards(
        [Shard(ensemble.piece(some), labels[some]) for some in rows],
        systems=[system.system for system in systems],
        labels=systems[0].labels,
    )
    print(
        f"{len(labels):,} clips of {len(systems)} systems, {len(rows)} files each: "
        f"{time.perf_counter() - start:.1f} s, {fusion.iterations} Newton steps, ridge {fusion.ridge:.1e}, "
        f"peak memory {peak_memory():.2f} GB, {os.cpu_count()} cores"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int)
    parser.add_argument("--systems", type=int, default=12)
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--ridge", type=float, default=1e-4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--storage", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--stream", type=Path)
    options = parser.parse_args()
    rng, clips = np.random.default_rng(0), options.clips or 139_620
    if options.write:
        write(options.write, options.clips or 10_000_000, options.systems, options.scenes)
    elif options.stream:
        stream(options.stream)
    elif options.storage:
        compare(*drawn(rng, clips, options.storage), options.ridge, options.runs)
    else:
        compare(*made_up(rng, clips, options.systems, options.scenes), options.ridge, options.runs)


if __name__ == "__main__":
    main()
