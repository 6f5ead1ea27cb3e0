"""The fusion's objective as sums over clips, shard by shard, and Newton's method on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from asc_ray.errors import UserError

BLOCK = 1024  # clips held in float64 at a time
TOLERANCE = 1e-9  # for the gradient's largest entry in its unit, times the ridge where that is above 1
MAX_PASSES = 200  # over the clips; 5 to 20 are needed


class NoMinimum(UserError):
    """The search did not converge."""


@dataclass(frozen=True)
class Shard:
    """Clips that are read together, anew in each pass: `read()` gives their logits (S, n, K)."""

    read: Callable[[], np.ndarray]
    scene: np.ndarray  # (n,) indices of scenes


@dataclass(frozen=True)
class Sums:
    """The weighted sum of the clips' cross-entropies, with its first and second derivatives by theta = (w, b)."""

    value: float
    gradient: np.ndarray  # (S + K,)
    hessian: np.ndarray  # (S + K, S + K); zeros where it was not asked for

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.value + other.value, self.gradient + other.gradient, self.hessian + other.hessian)


@dataclass(frozen=True)
class Pull:
    """Where the ridge pulls to: ridge / 2 (sum_s unit_s^2 (w_s - center_s)^2 + bias_unit^2 |b|^2)."""

    center: np.ndarray  # (S,)
    unit: np.ndarray  # (S,) of each system's logits
    ridge: float
    bias_unit: float = 1.0


def no_pull(systems: int) -> Pull:
    return Pull(np.zeros(systems), np.ones(systems), 0.0)


@dataclass(frozen=True)
class Problem:
    """J(theta) = sum_n a_n CE_n + the penalty of `pull`; a_n is `clip_weights` of the clip's scene."""

    shards: Sequence[Shard]
    clip_weights: np.ndarray  # (K,)
    pull: Pull
    nonnegative: bool = False  # w >= 0

    @property
    def units(self) -> np.ndarray:
        """Return the unit of each entry of theta's gradient."""
        return np.concatenate([self.pull.unit, np.full(len(self.clip_weights), self.pull.bias_unit)])

    @property
    def start(self) -> np.ndarray:
        """Return theta of the centre, without biases."""
        return np.concatenate([self.pull.center, np.zeros(len(self.clip_weights))])

    def evaluate(self, theta: np.ndarray, hessian: bool = True) -> Sums:
        """Return J at theta, with its derivatives; the shards are read one after the other."""
        each = (sums(shard, theta=theta, clip_weights=self.clip_weights, hessian=hessian) for shard in self.shards)
        strength = self.pull.ridge * self.units**2
        away = theta - self.start
        penalty = Sums(0.5 * float(strength @ away**2), strength * away, np.diag(strength))
        return reduce(Sums.__add__, each, penalty)


@dataclass(frozen=True)
class Minimum:
    theta: np.ndarray
    sums: Sums  # at theta
    iterations: int


def sums(shard: Shard, theta: np.ndarray, clip_weights: np.ndarray, hessian: bool = True) -> Sums:
    """Return what the shard's clips add to J; beyond what `read` gives, memory does not grow with the clips."""
    logits, scene = shard.read(), shard.scene
    count_s, count_n, count_k = logits.shape
    w, b = theta[:count_s], theta[count_s:, None]
    value, gradient = 0.0, np.zeros(len(theta))
    curvature = np.zeros((len(theta), len(theta)))
    ww, wb, bb = curvature[:count_s, :count_s], curvature[:count_s, count_s:], curvature[count_s:, count_s:]
    for start in range(0, count_n, BLOCK):
        y = scene[start : start + BLOCK]
        at_label = (y, np.arange(len(y)))
        a = clip_weights[y]
        # A copy (S, K, n), because it is changed below, and sums over clips run along its memory.
        z_s = np.array(logits[:, start : start + BLOCK].transpose(0, 2, 1), dtype=np.float64, order="C")
        flat = z_s.reshape(count_s, -1)
        z = (w @ flat).reshape(count_k, -1) + b
        z -= z.max(axis=0)
        right = z[at_label]
        p = np.exp(z, out=z)
        total = p.sum(axis=0)
        value += float(a @ (np.log(total) - right))
        p *= a / total  # the probabilities, weighted
        p[at_label] -= a
        gradient[:count_s] += flat @ p.reshape(-1)
        gradient[count_s:] += p.sum(axis=1)
        if not hessian:
            continue
        # The Hessian is the covariance under p of the derivatives of z: z_s for w_s, the unit vector e_k for b_k.
        p[at_label] += a
        root = np.sqrt(np.maximum(p, 0.0, out=p))
        z_s *= root
        ww += flat @ flat.T
        z_s *= root
        mean = z_s.sum(axis=1)  # (S, n), times a
        ww -= (mean / a) @ mean.T
        wb += z_s.sum(axis=2) - (mean / a) @ p.T
        bb += np.diag(p.sum(axis=1)) - (p / a) @ p.T
    curvature[count_s:, :count_s] = wb.T
    return Sums(value, gradient, curvature)


def minimize(
    problem: Problem, start: np.ndarray, tolerance: float = TOLERANCE, curvature: np.ndarray | None = None
) -> Minimum:
    """Minimize J by Newton's method with a line search; with `nonnegative` weights, each step keeps that bound.

    `curvature` is a Hessian for the first step, such as that of a sample of the clips. The search ends when no entry of
    the gradient, in its unit, is above `tolerance`, except those held at a bound. Raises NoMinimum where it does not
    end: without a ridge, when the systems separate the scenes and no finite minimum exists.
    """
    count_s = len(start) - len(problem.clip_weights)
    bounded = (np.arange(len(start)) < count_s) & problem.nonnegative
    theta, found = start, problem.evaluate(start, hessian=curvature is None)
    if curvature is not None:
        found = replace(found, hessian=curvature)
    iterations, passes, steepest, last = 0, 1, 0.0, False
    while True:
        # A weight of 0 stays there where J would grow with it.
        held = bounded & (theta <= 0) & (found.gradient >= 0)
        before, steepest = steepest, float(np.abs(found.gradient / problem.units)[~held].max(initial=0.0))
        if steepest <= tolerance:
            return Minimum(theta, found, iterations)
        if last:  # this was expected to be the minimum, so the Hessian was left out
            found = problem.evaluate(theta)
        # Convergence is quadratic, so the last two gradients predict the next one.
        last = steepest**3 <= tolerance * before**2
        step = _step(found, theta, bounded)
        step[count_s:] -= step[count_s:].mean()
        scale, accepted = 1.0, False
        while not accepted:
            if passes == MAX_PASSES:
                raise NoMinimum(
                    f"fusion: no minimum after {passes} passes over the clips (largest gradient entry {steepest:.1e}) "
                    f"with fusion.ridge {problem.pull.ridge:g}; set fusion.ridge higher, e.g. "
                    f"{max(1e-4, 10 * problem.pull.ridge):g}"
                )
            new = theta + scale * step
            new[bounded] = np.maximum(new[bounded], 0.0)  # rounding may leave it below 0
            candidate = problem.evaluate(new, hessian=not last)
            passes += 1
            # Near the minimum the decrease is lost in rounding, so equality to a few ulps is accepted too.
            slack = 8 * np.finfo(float).eps * abs(found.value)
            accepted = bool(candidate.value <= found.value + 1e-4 * found.gradient @ (new - theta) + slack)
            scale /= 2
        theta, found = new, candidate
        iterations += 1


def _step(found: Sums, theta: np.ndarray, bounded: np.ndarray) -> np.ndarray:
    """Return the step to the minimum of J's quadratic model.

    Where 0 bounds entries, it is found by active sets (Lawson and Hanson, 1974).
    """
    x, free = theta, ~bounded | (theta > 0)
    for _ in range(10 * len(theta)):
        slope = found.gradient + found.hessian @ (x - theta)
        move = np.zeros(len(theta))
        move[free] = -_solve(found.hessian[np.ix_(free, free)], slope[free])
        crossing = bounded & free & (x + move < 0)
        if crossing.any():  # go as far as the first bound, and stay at it
            reach = np.where(crossing, x / np.where(crossing, -move, 1.0), np.inf)
            x = x + reach.min() * move
            free &= reach > reach.min()
            x[~free] = 0.0
            continue
        x = x + move
        slope = np.where(free, 0.0, found.gradient + found.hessian @ (x - theta))
        if slope.min() >= -1e-10 * np.abs(found.gradient).max():
            break
        free[slope.argmin()] = True  # release the bound that holds back most
    return x - theta


def _solve(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return the least-norm solution: without a ridge the Hessian is singular along b + constant and equal systems.

    The Hessian is scaled to a diagonal of 1, so that a system with large logits does not hide the others.
    """
    diagonal = np.sqrt(np.maximum(hessian.diagonal(), 0.0))
    unit = np.where(diagonal > 0, 1.0 / np.where(diagonal > 0, diagonal, 1.0), 1.0)
    return unit * np.linalg.lstsq(hessian * np.outer(unit, unit), unit * gradient, rcond=None)[0]
