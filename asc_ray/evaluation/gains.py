"""What one system gains over another on the same clips, with an interval over places."""

import numpy as np

from asc_ray.evaluation.scores import log_posteriors
from asc_ray.section import Section

RESAMPLES = 2_000


class Interval(Section):
    """An estimate and the middle 95 % of its resamples."""

    value: float
    low: float
    high: float


class Gain(Section):
    """How much better one system is than another on the same clips; in both figures more is better."""

    log_loss: Interval  # decrease, in nats a clip
    accuracy: Interval  # increase, as a share of the clips
    places: int


def gain(before: np.ndarray, after: np.ndarray, scene: np.ndarray, places: np.ndarray) -> Gain:
    """Return the gain of logits `after` (N, K) over `before`, by bootstrap over `places` (N,).

    Clips of one place are alike, so whole places are drawn with replacement.
    """
    names, place = np.unique(places, return_inverse=True)
    at_label = np.arange(len(scene)), scene
    old, new = log_posteriors(before), log_posteriors(after)
    right = (new.argmax(axis=1) == scene).astype(float) - (old.argmax(axis=1) == scene)
    gained = np.stack([new[at_label] - old[at_label], right, np.ones(len(scene))])
    sums = np.stack([np.bincount(place, weights=each) for each in gained], axis=1)  # (places, 3)
    rng, even = np.random.default_rng(0), np.full(len(names), 1 / len(names))
    draws = [rng.multinomial(len(names), even).astype(float) @ sums for _ in range(RESAMPLES)]
    means = np.array([(loss / clips, accuracy / clips) for loss, accuracy, clips in draws])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    loss, accuracy = (
        Interval(value=float(each.mean()), low=float(a), high=float(b))
        for each, a, b in zip(gained[:2], low, high, strict=True)
    )
    return Gain(log_loss=loss, accuracy=accuracy, places=len(names))
