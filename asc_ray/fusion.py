"""Fusion of systems by multi-class linear logistic regression, eq. 4: z(k, x) = sum_s w_s z_s(k, x) + b_k.

    J(w, b) = sum_n a_n CE(softmax z(., x_n), y_n) + ridge / 2 (|w - 1/S|^2 + |b|^2),    sum_n a_n = 1

is convex and has S + K unknowns, so Newton's method with the exact Hessian finds its minimum in a few passes over the
clips. The ridge pulls towards the plain average of the systems, which is also where the search starts.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from asc_ray.errors import UserError
from asc_ray.section import Section

RIDGES = tuple(float(10**e) for e in np.arange(-4.0, 1.1, 0.5))
FOLDS = 5
BLOCK = 4096  # clips held in float64 at a time
TOLERANCE = 1e-9  # of the gradient's largest entry, relative to its value at the average (or to the ridge, or 1)
MAX_PASSES = 200  # over the clips; without separable classes 5 to 20 are needed


class FusionConfig(Section):
    """`ridge: auto` takes the one with the least log loss in cross-validation over groups of clips.

    `class_prior`: every clip weighs the same (empirical), or every class does (uniform).
    """

    ridge: Annotated[float, Field(ge=0.0)] | Literal["auto"] = "auto"
    class_prior: Literal["empirical", "uniform"] = "empirical"


@dataclass(frozen=True, eq=False)
class Fusion:
    """A fitted fusion; `objective_before` is J of the average, `objective_after` is J of these weights and biases."""

    weights: np.ndarray  # (S,) float64, in the order of `systems`
    biases: np.ndarray  # (K,) float64 of sum 0, in the order of `labels`
    systems: tuple[str, ...]
    labels: tuple[str, ...]
    ridge: float
    class_prior: str
    clips: int
    objective_before: float
    objective_after: float
    iterations: int

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Fused logits (N, K) float32 of (S, N, K) logits whose systems and classes are in the order of the fit.

        Raises UserError for another number of systems or classes.
        """
        if logits.ndim != 3 or (logits.shape[0], logits.shape[2]) != (len(self.weights), len(self.biases)):
            raise UserError(
                f"fusion: logits of shape {logits.shape} (systems, clips, classes); this fusion is of "
                f"{len(self.weights)} systems ({', '.join(self.systems)}) and {len(self.biases)} classes"
            )
        fused = np.empty(logits.shape[1:], dtype=np.float32)
        for rows in _blocks(logits.shape[1]):
            fused[rows] = _fuse(logits[:, rows].astype(np.float64), self.weights, self.biases)
        return fused

    def save(self, path: Path) -> None:
        """Write JSON from which `load` restores every number exactly."""
        document = asdict(self) | {
            "weights": dict(zip(self.systems, self.weights.tolist(), strict=True)),
            "biases": dict(zip(self.labels, self.biases.tolist(), strict=True)),
        }
        del document["systems"], document["labels"]
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Fusion":
        """Raises UserError when `path` is not a fusion's JSON."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            weights, biases = document.pop("weights"), document.pop("biases")
            return Fusion(
                weights=np.array(list(weights.values()), dtype=np.float64),
                biases=np.array(list(biases.values()), dtype=np.float64),
                systems=tuple(weights),
                labels=tuple(biases),
                **document,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as a fusion ({error}); run the fusion stage again") from None


def fit(
    logits: np.ndarray,
    labels: ArrayLike,
    *,
    systems: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    groups: ArrayLike | None = None,
    config: FusionConfig | None = None,
) -> Fusion:
    """The minimum of J for logits (S, N, K) and class indices `labels` (N,), on clips no system was trained on.

    `groups` (N,) are the clips' places: clips of one group are never on both sides of the cross-validation that chooses
    the ridge. Without them every clip is a group.

    Memory beyond the inputs does not grow with N; memory-mapped logits are read in blocks. Raises UserError for shapes
    that do not agree, logits that are not finite, classes without a clip, and a search that does not converge (only
    without a ridge, when the systems separate the classes and no finite minimum exists).

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(30_000) % 3
    >>> good = 2.0 * np.eye(3)[labels] + rng.standard_normal((30_000, 3))
    >>> noise = rng.standard_normal((30_000, 3))
    >>> fusion = fit(np.stack([good, noise]), labels, systems=["good", "noise"])
    >>> fusion.weights.round(1).tolist()
    [2.0, 0.0]
    >>> fusion.objective_after < fusion.objective_before
    True
    >>> fusion.apply(np.stack([good, noise])).shape
    (30000, 3)
    """
    config = config or FusionConfig()
    labels = np.asarray(labels)
    systems, classes = _check(logits, labels, systems, classes)
    ridge = config.ridge
    if ridge == "auto":
        ridge = _choose_ridge(logits, labels, np.arange(len(labels)) if groups is None else np.asarray(groups), config)
    theta, before, after, iterations = _minimize(logits, labels, config.class_prior, ridge)
    count_s = len(systems)
    return Fusion(
        weights=theta[:count_s],
        biases=theta[count_s:] - theta[count_s:].mean(),
        systems=systems,
        labels=classes,
        ridge=ridge,
        class_prior=config.class_prior,
        clips=len(labels),
        objective_before=before,
        objective_after=after,
        iterations=iterations,
    )


def _choose_ridge(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, config: FusionConfig) -> float:
    """The one of RIDGES with the least log loss on the groups left out, over FOLDS folds of whole groups."""
    names = np.unique(groups)
    np.random.default_rng(0).shuffle(names)
    losses = np.zeros(len(RIDGES))
    for fold in range(min(FOLDS, len(names))):
        held = np.isin(groups, names[fold::FOLDS])
        if held.all():  # one group alone: nothing can be left out
            return RIDGES[-1]
        rest, left_out = np.flatnonzero(~held), np.flatnonzero(held)
        for index, ridge in enumerate(RIDGES):
            theta, *_ = _minimize(logits[:, rest], labels[rest], config.class_prior, ridge)
            z = _fuse(logits[:, left_out].astype(np.float64), theta[: len(logits)], theta[len(logits) :])
            z -= z.max(axis=1, keepdims=True)
            at_label = z[np.arange(len(left_out)), labels[left_out]]
            losses[index] += float((np.log(np.exp(z).sum(axis=1)) - at_label).sum())
    return RIDGES[int(losses.argmin())]


def _minimize(
    logits: np.ndarray, labels: np.ndarray, class_prior: str, ridge: float
) -> tuple[np.ndarray, float, float, int]:
    """(theta, J at the average, J at theta, iterations) of Newton's search; theta = (w, b)."""
    count_s, _, count_k = logits.shape
    counts = np.bincount(labels, minlength=count_k)
    # A fold of the cross-validation may lack a class; its weight then meets no clip.
    uniform = 1.0 / (count_k * np.maximum(counts, 1))
    clip_weights = uniform if class_prior == "uniform" else np.full(count_k, 1.0 / counts.sum())

    def evaluate(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        return _objective(theta, logits, labels, clip_weights, ridge)

    theta = np.concatenate([np.full(count_s, 1.0 / count_s), np.zeros(count_k)])
    value, gradient, hessian = evaluate(theta)
    before, tolerance = value, TOLERANCE * max(1.0, ridge, np.abs(gradient).max())
    iterations, passes = 0, 1
    while np.abs(gradient).max() > tolerance:
        # The least-norm step: without a ridge the Hessian is singular along b + constant, and along w of equal systems.
        step = -np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        step[count_s:] -= step[count_s:].mean()
        slope, scale, accepted = gradient @ step, 1.0, False
        while not accepted:
            if passes == MAX_PASSES:
                raise UserError(
                    f"fusion: no minimum after {passes} passes over the clips (largest gradient entry "
                    f"{np.abs(gradient).max():.1e}) with fusion.ridge {ridge:g}; set fusion.ridge higher, "
                    f"e.g. {max(1e-4, 10 * ridge):g}"
                )
            candidate = evaluate(theta + scale * step)
            passes += 1
            # Near the minimum the decrease drowns in rounding; equality to a few ulps is then as good as a decrease.
            accepted = candidate[0] <= value + 1e-4 * scale * slope + 8 * np.finfo(float).eps * abs(value)
            if not accepted:
                scale /= 2
        theta = theta + scale * step
        value, gradient, hessian = candidate
        iterations += 1
    return theta, before, value, iterations


def _objective(
    theta: np.ndarray, logits: np.ndarray, labels: np.ndarray, clip_weights: np.ndarray, ridge: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """J, its gradient (S + K,) and its Hessian at theta = (w, b); `clip_weights` (K,) is a_n by the clip's class."""
    count_s, count_n, _ = logits.shape
    w, b = theta[:count_s], theta[count_s:]
    pull = np.concatenate([w - 1.0 / count_s, b])
    value, gradient, hessian = 0.5 * ridge * float(pull @ pull), ridge * pull, ridge * np.eye(len(theta))
    for rows in _blocks(count_n):
        z_s, y = logits[:, rows].astype(np.float64), labels[rows]  # (S, n, K), (n,)
        a = clip_weights[y]
        z = _fuse(z_s, w, b)
        z -= z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        at_label = (np.arange(len(y)), y)
        value -= float(a @ log_p[at_label])

        p = a[:, None] * np.exp(log_p)  # (n, K), weighted
        error = p.copy()
        error[at_label] -= a
        gradient[:count_s] += np.tensordot(z_s, error, axes=2)
        gradient[count_s:] += error.sum(axis=0)

        # The Hessian is the p-covariance of the derivatives of z: z_s for w_s, the unit vector e_k for b_k.
        mean = (z_s * np.exp(log_p)).sum(axis=2, keepdims=True)  # (S, n, 1)
        spread = (z_s - mean) * np.sqrt(p)
        spread = spread.reshape(count_s, -1)
        hessian[:count_s, :count_s] += spread @ spread.T
        cross = ((z_s - mean) * p).sum(axis=1)  # (S, K)
        hessian[:count_s, count_s:] += cross
        hessian[count_s:, :count_s] += cross.T
        hessian[count_s:, count_s:] += np.diag(p.sum(axis=0)) - p.T @ np.exp(log_p)
    return value, gradient, hessian


def _fuse(logits: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Eq. 4 for (S, n, K) logits."""
    return np.tensordot(weights, logits, axes=1) + biases


def _blocks(clips: int) -> Iterator[slice]:
    for start in range(0, clips, BLOCK):
        yield slice(start, start + BLOCK)


def _check(
    logits: np.ndarray, labels: np.ndarray, systems: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of systems and classes, numbered where not given; UserError as `fit` has it."""
    if logits.ndim != 3 or not all(logits.shape) or labels.shape != logits.shape[1:2]:
        raise UserError(
            f"fusion: logits of shape {logits.shape} and labels of shape {labels.shape}; expected (systems, clips, "
            "classes) and (clips,), none of them empty"
        )
    count_s, count_n, count_k = logits.shape
    systems = tuple(systems if systems is not None else (f"system {s}" for s in range(count_s)))
    classes = tuple(classes if classes is not None else (f"class {k}" for k in range(count_k)))
    for kind, names, count in (("system", systems, count_s), ("class", classes, count_k)):
        if len(names) != count or len(set(names)) != count:
            raise UserError(f"fusion: {kind} names {', '.join(names)}; expected {count} different ones, as the logits")
    broken = np.zeros(count_s, dtype=np.int64)
    for rows in _blocks(count_n):
        broken += (~np.isfinite(logits[:, rows]).all(axis=2)).sum(axis=1)
    if broken.any():
        found = ", ".join(f"{name}: {n} of {count_n} clips" for name, n in zip(systems, broken, strict=True) if n)
        raise UserError(f"fusion: logits that are not finite: {found}; run these systems' inference again")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= count_k:
        raise UserError(f"fusion: labels of type {labels.dtype}, expected class indices 0 to {count_k - 1}")
    counts = np.bincount(labels, minlength=count_k)
    if not counts.all():
        found = ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True))
        raise UserError(
            f"fusion: a class has no clip in the data that the fusion is learned on (clips: {found}); "
            "hold out a larger part of the training set"
        )
    return systems, classes
