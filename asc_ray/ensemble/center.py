"""Where the ridge of eq. 4 pulls to: weights that honest clips support before each system's own weight is fitted.

A system's logits, centred over the scenes, are its signal mu_s at the clip's scene and noise of deviation sigma_s. If
the noise were normal and the systems independent, the best weights would be (mu_s / sigma_s) / sigma_s: one that is
sure and wrong counts for nothing, a badly scaled one for what it knows. Systems are not independent, but with few clips
the inverse of their noise's covariance costs more than it gains. Of it two things are kept. What all systems have in
common a weak one does not add: COMMON of the mean ratio mu / sigma is subtracted from each, and what is then below 0
counts for nothing. And systems that are nearly the same share a weight: each is divided by the sum over t of
max(0, r_st)^ALIKE, where r is the noise's correlation. The scale of all weights is eq. 4's weight for the one system
that they make. COMMON and ALIKE were chosen on made-up ensembles (bench/fusion_small.py) and one real one
(docs/journal.md).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from asc_ray.ensemble.newton import BLOCK, Problem, Pull, Shard, minimize

ALIKE = 8  # two systems of correlation 0.7 each keep 95 % of their weight, copies half
COMMON = 0.5  # of the mean signal-to-noise ratio
LARGEST_SIGNAL = 5.0  # in deviations of the noise; few clips show no more, and right answers alone set no scale
SCALE_RIDGE = 0.01  # for the common scale, which is fitted without biases
NO_BIAS = 1e4
SCALE_TOLERANCE = 1e-6  # for the gradient by that scale


def center(shards: Sequence[Shard], clip_weights: np.ndarray) -> Pull:
    """Return a pull of no strength to the centre that these clips support; its units are sigma_s.

    `clip_weights` (K,) are a_n of the clips of each scene.
    """
    signal, covariance = _moments(shards, clip_weights)
    noise = _floored(np.sqrt(np.maximum(covariance.diagonal(), 0.0)), signal)
    correlation = covariance / np.outer(noise, noise)
    alike = np.maximum((np.maximum(correlation, 0.0) ** ALIKE).sum(axis=1), 1.0)
    ratio = signal / noise
    weights = np.maximum(ratio - COMMON * max(float(ratio.mean()), 0.0), 0.0) / (noise * alike)
    if weights.any():
        own = weights @ signal
        deviation = _floored(np.sqrt(np.maximum(weights @ covariance @ weights, 0.0)), own)
        each = [np.tensordot(weights, shard.read(), axes=1)[None] for shard in shards]
        pooled = [Shard(partial(np.asarray, z), shard.scene) for z, shard in zip(each, shards, strict=True)]
        pull = Pull(np.atleast_1d(own / deviation**2), np.atleast_1d(deviation), SCALE_RIDGE, NO_BIAS)
        of_one = Problem(pooled, clip_weights, pull, nonnegative=True)
        weights = weights * minimize(of_one, of_one.start, SCALE_TOLERANCE).theta[0]
    return Pull(weights, noise, 0.0)


def _floored(noise: np.ndarray, signal: np.ndarray) -> np.ndarray:
    noise = np.maximum(noise, np.abs(signal) / LARGEST_SIGNAL)
    return np.where(noise > 0, noise, 1.0)  # logits that do not differ between the scenes have no unit


def _moments(shards: Sequence[Shard], clip_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the systems' signal (S,) and the covariance (S, S) of their noise."""
    at_scene = products = total = np.zeros(())
    for shard in shards:
        logits = shard.read()
        for start in range(0, len(shard.scene), BLOCK):
            y = shard.scene[start : start + BLOCK]
            a = clip_weights[y]
            u = logits[:, start : start + BLOCK].astype(np.float64)
            u -= u.mean(axis=2, keepdims=True)
            at_scene = at_scene + u[:, np.arange(len(y)), y] @ a
            flat = (u * np.sqrt(a)[:, None]).reshape(len(u), -1)
            products = products + flat @ flat.T
            total = total + a.sum()
    scenes = len(clip_weights)
    squares = total * (1 - 1 / scenes)  # of [k = y] - 1/K, the centred unit vector at the scene
    signal = at_scene / squares
    return signal, (products - squares * np.outer(signal, signal)) / (total * (scenes - 1))
